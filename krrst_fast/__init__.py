"""Fast kernel ridge regression on network features, and dataset distillation with it (KRR-ST)."""
