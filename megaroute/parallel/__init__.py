"""How the model and the batch are cut: arithmetic (dims), process groups (groups), layers of stages (stages)."""
