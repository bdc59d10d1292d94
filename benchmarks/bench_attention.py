"""`pytest benchmarks -k attention` times this op: every case, direction and peer that runs here."""

OP = "attention"


def test_attention(time_op, case, direction, peer):
    time_op(OP, case, direction, peer)
