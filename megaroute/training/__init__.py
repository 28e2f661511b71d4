"""The run: setup builds, state remembers, step computes, loop sequences."""
