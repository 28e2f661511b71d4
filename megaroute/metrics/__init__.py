"""What a run writes about itself: records, the sinks that take them, their history, and the report made of it."""
