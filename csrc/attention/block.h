// The targets' side of a tile: queries of a block, and the tile that their scores are computed in. Compiled once for
// each instruction set.
#pragma once

#include "attention/tiles.h"

namespace zk::ZK_ISA {

// Memory of one thread that works on a block of targets.
template <class W>
struct Block {
  Block(W* scratch, const AttentionWeights& args)
      : q(scratch), p(q + tile_rows * args.query_channels), tile(p + tile_rows * args.position_channels) {}

  static int64_t size(const AttentionWeights& args) {
    return tile_rows * (args.query_channels + args.position_channels) + tile_size;
  }

  template <class T>
  void load(const Scores<T>& scores, int64_t pair, int64_t block) {
    const AttentionWeights& args = scores.args;
    int64_t first = block * tile_rows, rows = scores.rows_of(block);
    int64_t b = scores.sequence_of(pair), h = scores.head_of(pair);
    load_rows<T>(args.q, first, rows, b, h, args.query_channels, q, args.query_channels);
    if (args.p.data) load_rows<T>(args.p, first, rows, b, h, args.position_channels, p, args.position_channels);
  }

  W *q, *p, *tile;
};

}  // namespace zk::ZK_ISA
