// Units of one adapted matrix and where their components live.
//
// A unit is the whole matrix, or one head's slice of it: a block of output columns (q, k, v) or of input columns
// (attention output). Component i of a unit is one row of lora_A and one row of lora_B. Both factors are rank-major:
//   A [a_rows, a_width], B [b_rows, b_width];  H = x A^T,  y += scale * (g o H) B.
// `independent`: each unit owns its rows of both factors. `shared`: the factor that spans the whole matrix exists once
// and unit u uses its first r_u rows; the factor of the slices holds r_u rows for each unit, unit after unit.
//
// `experts`: each unit is a whole matrix with its own rows of both factors, and acts on its own rows of the activations
// (lora_grouped.h); all use columns of H from 0 on.
#pragma once

#include <cstdint>
#include <vector>

namespace ardlora {

enum class UnitKind : int { kMatrix = 0, kOutHeads = 1, kInHeads = 2, kExperts = 3 };
enum class Factoring : int { kIndependent = 0, kShared = 1 };

// Rows [w_begin, w_begin + rank) of a factor act on columns [col_begin, col_begin + width) of the activations
// through columns [h_begin, h_begin + rank) of H. Segments of one factor never share a factor row.
struct Segment {
  std::int64_t h_begin;
  std::int64_t rank;
  std::int64_t w_begin;
  std::int64_t col_begin;
};

struct Factor {
  std::int64_t rows = 0;      // live rows, all segments together
  std::int64_t width = 0;     // columns of a factor row
  std::int64_t features = 0;  // columns of the activations it acts on
  std::int64_t max_rank = 0;  // largest segment
  std::vector<Segment> segments;
};

class UnitTable {
 public:
  // `ranks` has one entry per unit; heads must divide the features they cut.
  UnitTable(UnitKind kind, Factoring factoring, std::int64_t in_features, std::int64_t out_features,
            std::vector<std::int64_t> ranks);

  UnitKind kind() const { return kind_; }
  const Factor& a() const { return a_; }
  const Factor& b() const { return b_; }
  std::int64_t hidden() const { return hidden_; }  // columns of H
  bool gate_on_a() const { return gate_on_a_; }    // else on B; one gate per row of that factor
  const std::vector<std::int64_t>& ranks() const { return ranks_; }
  const std::vector<std::int64_t>& unit_begin() const { return unit_begin_; }  // [units + 1], rows of the gated factor

 private:
  UnitKind kind_;
  std::vector<std::int64_t> ranks_;
  std::vector<std::int64_t> unit_begin_;
  Factor a_;
  Factor b_;
  std::int64_t hidden_ = 0;
  bool gate_on_a_ = false;
};

}  // namespace ardlora
