"""What a run will take, before it takes it: one step rehearsed on meta tensors, every allocation written down."""
