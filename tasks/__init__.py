"""The tasks that come with queryvision; imported as `queryvision.tasks`."""

if __name__ != "queryvision.tasks":
    raise ImportError(f"import the tasks as queryvision.tasks, not as '{__name__}'")
