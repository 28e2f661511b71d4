"""Checkpoints: layout on disk (no torch), saving and loading across layouts, retention."""
