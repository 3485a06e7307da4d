// What the three kernels of an MLA decode step share: the plan's parts, and the arguments of attention and combine.
#pragma once
#include "ptx.cuh"

constexpr u32 LATENT = 512;
// mla_combine gives GROUPS rows of a sequence of up to FEW pieces a group of threads each, and half a row of one of more pieces all
// its warps; mla_plan lists the rows accordingly.
constexpr u32 GROUPS = 8, FEW = 16;

// A run of 64-token blocks, of one or several sequences.
struct Part {
    int first_seq, first_block, last_seq, end_block;  // from block first_block of first_seq up to end_block of last_seq
    int split;                                        // index of first_seq's piece among that sequence's pieces
    int ids[2];                                       // the first two blocks' entries of the block table
    int settled;                                      // blocks of first_seq that hold no token of this step
};

struct MlaArgs {
    const int* lengths;      // [batch] cached tokens, this step's included
    const int* block_table;  // [batch][max_blocks]
    const Part* parts;       // [parts]; first_seq = -1: nothing to do
    const int* pieces;       // [batch + 1] first slot of each sequence's pieces among the partials
    const int* rows;         // rows to combine: how many, then from word 4 on units of sequence, first row (or half of a row), first slot, slots
    u16* out;                // [batch * queries * heads][512]
    u16* partial;            // [slots][row_tiles * 64][512] FP16
    float4* sums;            // [slots][row_tiles * 64]: log-sum-exp (base 2), magnitude of columns 0 to 255, of 256 to 511
    u32 batch, queries, heads, max_blocks, layer;
    float scale;             // softmax scale times log2(e)
};
