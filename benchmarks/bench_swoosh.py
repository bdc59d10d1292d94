"""`pytest benchmarks -k swoosh` times this op: every case, direction and peer that runs here."""

OP = "swoosh"


def test_swoosh(time_op, case, direction, peer):
    time_op(OP, case, direction, peer)
