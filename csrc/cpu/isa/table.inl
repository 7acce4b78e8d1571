// The kernels of one instruction set as a table. Included by isa/<name>.cpp inside its namespace.
template <typename T, typename WT>
constexpr bool kPaired = std::is_same_v<WT, float> || std::is_same_v<WT, T>;  // as check_dtype_pair

template <typename T, typename WT>
constexpr PackShrinkFn pack_shrink_of() {
  if constexpr (kPaired<T, WT>) return pack_shrink<Operands<T>, WT>;
  return nullptr;
}

template <typename T, typename WT>
constexpr PackExpandFn pack_expand_of() {
  if constexpr (kPaired<T, WT>) return pack_expand<Operands<T>, WT>;
  return nullptr;
}

template <typename T>
constexpr ActivationKernels activation_kernels() {
  using Ops = Operands<T>;
  return {
      std::is_same_v<typename Ops::Elem, float> ? DType::kFloat32 : DType::kBFloat16,
      Ops::kDepth,
      pack_rows<T>,
      {pack_shrink_of<T, float>(), pack_shrink_of<T, BFloat16>(), pack_shrink_of<T, Float16>()},
      shrink<Ops>,
      {pack_expand_of<T, float>(), pack_expand_of<T, BFloat16>(), pack_expand_of<T, Float16>()},
      pack_hidden<Ops>,
      expand<T>,
      Ops::kDepth == 1 ? nullptr : pair_hidden,
      outer<T>,
  };
}

extern const KernelTable kTable;
const KernelTable kTable = {
    ARDLORA_ISA_NAME,
    ARDLORA_ISA_NEEDS,
    Vec::kWidth,
    {activation_kernels<float>(), activation_kernels<BFloat16>(), activation_kernels<Float16>()},
    keep_bits,
    {
        {row_dot<float, float>, nullptr, nullptr},
        {row_dot<BFloat16, float>, row_dot<BFloat16, BFloat16>, nullptr},
        {row_dot<Float16, float>, nullptr, row_dot<Float16, Float16>},
    },
    {add_combination<float>, add_combination<BFloat16>, add_combination<Float16>},
    {importance_finite<float>, importance_finite<BFloat16>, importance_finite<Float16>},
    {importance_update<float>, importance_update<BFloat16>, importance_update<Float16>},
    fma_loop,
    pair_loop,
    stream_read,
    stream_update,
};
