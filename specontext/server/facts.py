"""Where facts about a request stand until its line in the log is written."""

FACTS = "specontext.facts"  # key of the ASGI scope
