// The kernels of one instruction set as a table. Included by isa/<name>.cpp inside its namespace.
// Pairs of activation and adapter that check_dtype_pair refuses have no kernel; rows under dropout are float, whatever
// their type was.
#define ARDLORA_PAIRS(fn)                                          \
  {                                                                \
      {fn<float, float>, fn<float, BFloat16>, fn<float, Float16>}, \
      {fn<BFloat16, float>, fn<BFloat16, BFloat16>, nullptr},      \
      {fn<Float16, float>, nullptr, fn<Float16, Float16>},         \
  }
#define ARDLORA_EACH(fn) {fn<float>, fn<BFloat16>, fn<Float16>}

extern const KernelTable kTable;
const KernelTable kTable = {
    ARDLORA_ISA_NAME,
    ARDLORA_ISA_NEEDS,
    ARDLORA_PAIRS(shrink),
    ARDLORA_PAIRS(expand),
    ARDLORA_EACH(outer),
    ARDLORA_EACH(dropout_copy),
    ARDLORA_EACH(dropout_add),
    ARDLORA_PAIRS(row_dot),
    Vec::kWidth,
    fma_loop,
    pair_loop,
    stream_read,
    stream_update,
};
