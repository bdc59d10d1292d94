"""CUDA graphs of a model's forward pass and of whole training steps: kernels follow each other without Python."""

from zipformer_kernels.graphs.capture import CaptureError, CudaGraphs
from zipformer_kernels.graphs.inference import Graphed, graphed
from zipformer_kernels.graphs.step import GraphedStep

__all__ = ["CaptureError", "CudaGraphs", "Graphed", "GraphedStep", "graphed"]
