"""How good features are: nearest neighbours and linear probes on frozen features. ``fastkd eval`` is its command."""
