"""Packaging. `pip install -e .`, with the extra [cuda] or [tpu] where there is an accelerator."""

import pathlib

import setuptools

# Lower bounds are the oldest releases that the tests have passed with.
_CORE = [
    'absl-py>=2.1',
    'array_record>=0.8',
    'etils[epath]>=1.10',
    'flax>=0.12',
    'gin-config>=0.5.0',
    'grain>=0.2.15',
    'importlib_resources>=6',  # tensorflow-datasets imports it and does not say so
    'jax>=0.10',
    'jinja2>=3.1',
    'numpy>=2.0',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.12',
    'pyarrow>=16',
    'safetensors>=0.5',
    'sentencepiece>=0.2',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.9',
    'tokenizers>=0.21',
    'tqdm>=4.66',
    'vaderSentiment>=3.3',
]

setuptools.setup(
    name='jaxalign',
    version='0.1.0',
    description='Aligns language models in JAX.',
    long_description=pathlib.Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11,<3.14',
    packages=setuptools.find_packages(include=['jaxalign', 'jaxalign.*']),
    # jaxalign/gin_configs is a link to the folder at the top, so that a wheel holds it too.
    package_data={'jaxalign': ['gin_configs/**/*.gin', 'assets/*', 'assets/*/*']},
    entry_points={'console_scripts': ['jaxalign = jaxalign.main:run']},
    install_requires=_CORE,
    extras_require={
        'tpu': ['jax[tpu]>=0.10'],
        # Paths in buckets: gs://BUCKET/NAME.
        'gcs': ['gcsfs>=2026.4'],
        'cuda': ['jax[cuda12]>=0.10'],
        'test': [
            'qwix>=0.1.8',
            'chex>=0.1.90',
            'gcp-storage-emulator>=2026.7.18',
            'gcsfs>=2026.4',
            'hypothesis>=6.100',
            'mypy>=1.15',
            'pyink>=25.1',
            'pytest>=8.3',
            'pytest-xdist>=3.6',
            'ruff>=0.12',
            'setuptools>=77',
            # Its libtpu compiles for TPUs ahead of time, without one; jax names the release that fits.
            'jax[tpu]>=0.10; sys_platform == "linux" and platform_machine == "x86_64"',
        ],
        'tools': ['matplotlib>=3.8', 'protobuf>=5'],
        # Adapters of a base in 8 or 4 bits: --lora=base:nf4.
        'qlora': ['qwix>=0.1.8'],
        # The reward rules.math_answer.
        'math': ['math-verify[antlr4_13_2]>=0.7'],
        'goldens': ['peft>=0.17', 'torch>=2.6', 'transformers>=5', 'trl>=1'],
    },
)
