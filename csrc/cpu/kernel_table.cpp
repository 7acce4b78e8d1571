#include "cpu/kernel_table.h"

#include <atomic>
#include <cstdlib>

#include "cpu/cpu_features.h"

namespace ardlora::cpu {

#ifdef ARDLORA_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const KernelTable kTable;
}
#endif
#ifdef ARDLORA_HAVE_AVX512
namespace avx512 {
extern const KernelTable kTable;
}
#endif
#ifdef ARDLORA_HAVE_AVX2
namespace avx2 {
extern const KernelTable kTable;
}
#endif
#ifdef ARDLORA_HAVE_NEON
namespace neon {
extern const KernelTable kTable;
}
#endif
namespace scalar {
extern const KernelTable kTable;
}

namespace {

const std::vector<const KernelTable*>& built() {
  static const std::vector<const KernelTable*> tables = {
#ifdef ARDLORA_HAVE_AVX512_BF16
      &avx512_bf16::kTable,
#endif
#ifdef ARDLORA_HAVE_AVX512
      &avx512::kTable,
#endif
#ifdef ARDLORA_HAVE_AVX2
      &avx2::kTable,
#endif
#ifdef ARDLORA_HAVE_NEON
      &neon::kTable,
#endif
      &scalar::kTable,
  };
  return tables;
}

bool runnable(const KernelTable& table) {
  static const std::uint32_t features = detect_features();
  return (table.needs & ~features) == 0;
}

std::string join(const std::vector<std::string>& names) {
  std::string out;
  for (const auto& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

const KernelTable& find(const std::string& name, const char* op) {
  for (const KernelTable* table : built()) {
    if (name == table->name && runnable(*table)) return *table;
  }
  fail(ErrorKind::kValue, op, ": instruction set must be one this CPU can run (", join(available_isas()),
       "; built: ", join(built_isas()), "), got '", name, "'");
}

const KernelTable& choose() {
  const char* forced = std::getenv("ARDLORA_ISA");
  if (forced != nullptr && *forced != '\0') return find(forced, "ARDLORA_ISA");
  for (const KernelTable* table : built()) {
    if (runnable(*table)) return *table;
  }
  return scalar::kTable;
}

std::atomic<const KernelTable*> g_active{nullptr};

}  // namespace

const KernelTable& active() {
  const KernelTable* table = g_active.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = &choose();
    g_active.store(table, std::memory_order_release);
  }
  return *table;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : built()) names.emplace_back(table->name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : built()) {
    if (runnable(*table)) names.emplace_back(table->name);
  }
  return names;
}

void set_isa(const std::string& name) { g_active.store(name.empty() ? &choose() : &find(name, "set_isa")); }

}  // namespace ardlora::cpu
