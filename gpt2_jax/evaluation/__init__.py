"""Tasks, and the runs that score a model on them."""

# lm_eval needs the extra `eval`, so that it is imported by name alone.
__all__ = ["task_runs", "tasks"]
