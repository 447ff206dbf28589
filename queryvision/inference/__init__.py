"""From a checkpoint and pictures to results."""
