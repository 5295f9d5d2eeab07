"""Training: configuration, data, tasks, the loop and the `zoo` command."""
