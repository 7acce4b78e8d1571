// The kernels of one instruction set as a table. Included by isa/<name>.cpp inside its namespace.
#define ARDLORA_PAIRS(fn)                                                                    \
  {                                                                                          \
    {fn<float, float>, fn<float, BFloat16>}, { fn<BFloat16, float>, fn<BFloat16, BFloat16> } \
  }

extern const KernelTable kTable;
const KernelTable kTable = {
    ARDLORA_ISA_NAME,
    ARDLORA_ISA_NEEDS,
    ARDLORA_PAIRS(shrink),
    ARDLORA_PAIRS(expand),
    {outer<float>, outer<BFloat16>},
    {dropout_copy<float>, dropout_copy<BFloat16>},
    {dropout_add<float>, dropout_add<BFloat16>},
    {row_dot<float>, row_dot<BFloat16>},
};
