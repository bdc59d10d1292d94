"""`pytest benchmarks -k swoosh_linear` times this op: every case, direction and peer that runs here."""

OP = "swoosh_linear"


def test_swoosh_linear(time_op, case, direction, peer):
    time_op(OP, case, direction, peer)
