"""`pytest benchmarks -k nonlin_attention` times this op: every case, direction and peer that runs here."""

OP = "nonlin_attention"


def test_nonlin_attention(time_op, case, direction, peer):
    time_op(OP, case, direction, peer)
