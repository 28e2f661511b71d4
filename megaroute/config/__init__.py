"""Configuration: pydantic sections, YAML with one `extends`, dotted overrides, checks across sections.  No torch."""
