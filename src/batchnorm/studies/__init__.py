"""Studies: tasks, networks, the trainer, and one file a study. They write records."""
