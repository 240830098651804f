"""Services that follow the metrics of a run: TensorBoard, Weights & Biases, trackio, your own."""
