"""`pytest benchmarks -k bias_norm` times this op: every case, direction and peer that runs here."""

OP = "bias_norm"


def test_bias_norm(time_op, case, direction, peer):
    time_op(OP, case, direction, peer)
