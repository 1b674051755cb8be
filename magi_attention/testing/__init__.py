"""What tests need: the dense oracle, the mask zoo, and hypothesis strategies that generate masks."""
