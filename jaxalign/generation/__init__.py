"""Text from a policy: sampling on the device, and alignment that needs no training."""
