"""From the folder of a Transformers decoder to its ONNX graph; the weights stay where they are."""
