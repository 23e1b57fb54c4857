"""The cost of an optimizer: baselines side by side, the least that their products take, and the parts of a step."""
