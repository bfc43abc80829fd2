"""The differentiable operators: one file an op, public function first."""
