"""Online RL: rollouts, what rewards and advantages make of them, and the batches they become."""
