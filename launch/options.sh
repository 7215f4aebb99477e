# Sourced by the launchers of machines elsewhere: their options, and how they run or print commands.

say() {
  echo "jaxalign: $*" >&2
}

# Whether it is a number as bash counts: with a 0 before it, it would be octal.
is_count() {
  [[ $1 =~ ^(0|[1-9][0-9]*)$ ]]
}

misuse() {
  say "$@"
  exit 2
}

# Says what becomes of what a run of training saves, on machines that are there for it alone, where nobody says where to.
warn_of_workdir() {
  [[ " $* " == *' --mode='* || " $* " == *' --workdir'* ]] ||
    say 'without --workdir checkpoints stay on the disks of the machines, and go with them'
}

# Prints the head of the script, which says what it does and takes.
explain() {
  sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "$0"
  exit 0
}

[[ ${1:-} != --help ]] || explain

# read_options 'switches' 'names of options with values' "$@": sets a variable for each (empty where it is not given),
# and `rest` to the arguments from the first that is neither.
read_options() {
  local switches_=" $1 " valued_=" $2 " name_ arg_
  shift 2
  for name_ in $switches_ $valued_; do
    printf -v "$name_" '%s' ''
  done
  rest=()
  while (($#)); do
    name_=${1#--}
    name_=${name_%%=*}
    if [[ $1 == -- ]]; then
      shift
      rest=("$@")
      return
    elif [[ $1 == --help ]]; then
      explain
    elif [[ $1 == "--$name_" && $switches_ == *" $name_ "* ]]; then
      printf -v "$name_" 1
    elif [[ $1 == "--$name_="?* && $valued_ == *" $name_ "* ]]; then
      printf -v "$name_" '%s' "${1#*=}"
    elif [[ $1 == "--$name_"* && $valued_ == *" $name_ "* ]]; then
      misuse "--$name_ needs a value: --$name_=..."
    elif [[ $1 == "--$name_="* && $switches_ == *" $name_ "* ]]; then
      misuse "--$name_ takes no value"
    else
      break
    fi
    shift
  done
  [[ $# == 0 || $1 == -* ]] || misuse "$1: flags of jaxalign begin with --"
  for arg_; do
    name_=${arg_#--}
    name_=${name_%%=*}
    [[ $arg_ != --* || "$switches_$valued_" != *" $name_ "* ]] ||
      misuse "--$name_ must come before the flags of jaxalign"
    # What is misspelt is found before there are machines to be paid.
    [[ $arg_ != --?* ]] || grep -qF -e "'$name_'," -e "'${name_#no}'," "$ROOT/jaxalign/cli/flag_table.py" ||
      misuse "--$name_: neither an option nor a flag of jaxalign"
  done
  rest=("$@")
}
