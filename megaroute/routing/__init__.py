"""Routing: noise, router, plan, dispatch, budget.  Pure torch; knows nothing of Megatron-core, data or training.

Shapes, in every file of this package: S sequence, B batch (rows of a micro-batch), H hidden, K kept rows,
R computed rows (kept rows and padding), T chunks of the sequence (tensor ranks under sequence parallelism, else 1).
"""
