"""`pytest benchmarks -k encoder` times whole models: every size and every peer that runs here."""

BENCHMARKS = (
    "conv-embed",
    "encoder-forward",
    "training-step",
    "streaming-chunk",
    "encoder-products",
    "conformer",
)


def test_encoder(time_job, job, peer):
    time_job(job, peer)
