// The engine behind testing/simt.h: fibers, barriers, the exchange of a warp, copies in flight. Compile this file
// without sanitizers: it tells them about its fibers itself, where they are linked in.
#include "testing/simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* address) __attribute__((weak));
void __tsan_release(void* address) __attribute__((weak));
}

namespace simt {

Thread* current = nullptr;

namespace {

std::map<const void*, std::size_t> shared_limits;

// ---- contexts: a stack and what a switch saves on it

#if defined(__x86_64__)
struct Registers {
  void* stack_pointer;
};
extern "C" void simt_swap(void** save, void* load);
asm(R"(
.text
.type simt_swap, @function
simt_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size simt_swap, .-simt_swap
)");
void prepare(Registers* r, unsigned char* stack, std::size_t size, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + size);  // divisible by 16
  *--top = nullptr;                                     // where the entry would return to, which it does not
  *--top = reinterpret_cast<void*>(entry);
  r->stack_pointer = top - 6;
}
void swap(Registers* from, Registers* to) { simt_swap(&from->stack_pointer, to->stack_pointer); }
#else
using Registers = ucontext_t;
void prepare(Registers* r, unsigned char* stack, std::size_t size, void (*entry)()) {
  getcontext(r);
  r->uc_stack.ss_sp = stack;
  r->uc_stack.ss_size = size;
  r->uc_link = nullptr;
  makecontext(r, entry, 0);
}
void swap(Registers* from, Registers* to) { swapcontext(from, to); }
#endif

constexpr std::size_t kPage = 4096, kStack = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kMaxTsanFibers = 4096;    // of the 8128 that TSan can hold
constexpr std::size_t kMaxShared = 227 * 1024;  // of one block of sm_90

struct Stack {
  Stack() {
    void* p = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kPage, PROT_NONE) != 0) fail("no memory for a stack");
    bottom = static_cast<unsigned char*>(p) + kPage;
  }
  unsigned char* bottom;  // a page below it faults
  void* tsan = __tsan_create_fiber == nullptr ? nullptr : __tsan_create_fiber(0);
};

// Everything a fiber touches has a fixed size: TSan would see memory allocated by one and freed by another as a race.
struct Copies {
  struct Item {
    Copy copy;
    int group;
  };
  static constexpr unsigned kMax = 128;
  Item items[kMax];
  unsigned first = 0, count = 0;
  int groups = 0;  // committed so far
};

struct Fiber {
  Thread thread;  // first: `current` points here
  Registers registers;
  void* fake_stack;
  void* tsan;
  const void* bottom;
  std::size_t size;
  Copies copies;
  const char* waits_at;
  bool begun;
  std::uint32_t words[kMaxWords];
};

struct Warp {
  unsigned arrived;
  std::uint32_t shown[kWarp][kMaxWords];
};

struct Engine {
  Fiber main{};
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / kWarp];
  std::vector<std::unique_ptr<Stack>> stacks;
  std::size_t next_stack = 0;
  Fiber* ready[kMaxThreads];  // a ring
  unsigned first_ready = 0, ready_count = 0;
  unsigned threads = 0, alive = 0, arrived = 0;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  Order order = Order::kForward;
  std::uint32_t random = 1;
  std::vector<void*> old_shared;
};

Engine& engine() {
  static Engine* e = new Engine;
  return *e;
}

unsigned next_random(unsigned below) {
  engine().random = engine().random * 1664525u + 1013904223u;
  return (engine().random >> 8) % below;
}

void acquire(void* p) {
  if (__tsan_acquire != nullptr) __tsan_acquire(p);
}
void release(void* p) {
  if (__tsan_release != nullptr) __tsan_release(p);
}

Fiber* running() {
  return reinterpret_cast<Fiber*>(current);  // its first member
}

void after_switch(Fiber* self) {
  if (__sanitizer_finish_switch_fiber == nullptr) return;
  Fiber& main = engine().main;
  const void* bottom;
  std::size_t size;
  __sanitizer_finish_switch_fiber(self->fake_stack, &bottom, &size);
  if (main.bottom == nullptr && self != &main) {
    main.bottom = bottom;
    main.size = size;
  }
}

void switch_to(Fiber* from, Fiber* to, bool for_ever = false) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from->fake_stack, to->bottom, to->size);
  }
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(to->tsan, 1);  // 1: orders nothing
  current = &to->thread;
  swap(&from->registers, &to->registers);
  after_switch(from);
}

[[noreturn]] void fail_deadlock() {
  const Engine& e = engine();
  const char* sample = nullptr;
  unsigned waiting = 0;
  for (unsigned i = 0; i < e.threads; ++i) {
    if (e.fibers[i].waits_at == nullptr) continue;
    ++waiting;
    sample = e.fibers[i].waits_at;
  }
  fail("deadlock: %u of %u threads wait, one at %s, for threads that left or wait elsewhere", waiting, e.threads,
       sample);
}

void push_ready(Fiber* f) {
  Engine& e = engine();
  e.ready[(e.first_ready + e.ready_count++) % kMaxThreads] = f;
}

Fiber* pop_ready() {
  Engine& e = engine();
  if (e.ready_count == 0) fail_deadlock();
  --e.ready_count;
  const bool last = e.order == Order::kReverse || (e.order == Order::kSeeded && next_random(2) == 1);
  if (last) return e.ready[(e.first_ready + e.ready_count) % kMaxThreads];
  return e.ready[e.first_ready++ % kMaxThreads];
}

unsigned index(const Fiber* f) { return static_cast<unsigned>(f - engine().fibers); }

// The last of `count` threads, from `first` on, does `finish` and goes on; the others wait for it.
template <typename Finish>
void meet(const char* at, unsigned* arrived, unsigned first, unsigned count, Finish finish) {
  Engine& e = engine();
  Fiber* self = running();
  self->waits_at = at;
  if (++*arrived < count) {
    switch_to(self, pop_ready());
    return;
  }
  finish();
  *arrived = 0;
  for (unsigned i = first; i < first + count; ++i) {
    e.fibers[i].waits_at = nullptr;
    if (&e.fibers[i] != self) push_ready(&e.fibers[i]);
  }
}

template <typename Finish>
void meet_warp(const char* at, Finish finish) {
  Engine& e = engine();
  const unsigned w = index(running()) / kWarp, first = w * kWarp;
  meet(at, &e.warps[w].arrived, first, kWarp, [&] {
    for (unsigned i = first; i < first + kWarp; ++i) {
      const char* other = e.fibers[i].waits_at;
      if (std::strcmp(other, at) != 0) fail("lanes of warp %u meet at different instructions: %s and %s", w, at, other);
    }
    finish(e.warps[w], first);
  });
}

void entry() {
  Engine& e = engine();
  Fiber* self = running();
  after_switch(self);
  acquire(&e.body);
  e.body(e.arguments);
  if (begins.required && !self->begun) fail("a thread left without begin_kernel");
  release(&e.alive);
  switch_to(self, --e.alive == 0 ? &e.main : pop_ready(), true);
}

// A thread of a launch has a stack, and a TSan fiber, that no other thread of the launch had: TSan tells them apart.
const Stack& next_stack() {
  Engine& e = engine();
  if (e.next_stack == e.stacks.size()) e.stacks.push_back(std::make_unique<Stack>());
  return *e.stacks[e.next_stack++];
}

void start_thread(unsigned i, dim3 block, const Thread& shape) {
  Engine& e = engine();
  Fiber& f = e.fibers[i];
  const Stack& stack = next_stack();
  f = Fiber{};
  f.thread = shape;
  f.thread.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  f.thread.lane = i % kWarp;
  f.bottom = stack.bottom;
  f.size = kStack;
  f.tsan = stack.tsan;
  prepare(&f.registers, stack.bottom, kStack, entry);
  push_ready(&f);
}

// Without TSan after each block. TSan would take a later block's use of the same address for a race, so there what
// blocks used stays until the launch ends, or until there is too much of it.
void forget_blocks() {
  Engine& e = engine();
  acquire(&e.alive);
  for (void* p : e.old_shared) std::free(p);
  e.old_shared.clear();
  e.next_stack = 0;
}

void run_block(Thread shape) {
  Engine& e = engine();
  if (__tsan_create_fiber == nullptr || e.next_stack + e.threads > kMaxTsanFibers) forget_blocks();
  // The end is exact, so that AddressSanitizer sees the first byte past it.
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, std::max<std::size_t>(shape.shared_bytes, 1)) != 0) fail("no shared memory");
  e.old_shared.push_back(shared);
  std::memset(shared, 0xff, shape.shared_bytes);
  shape.shared = static_cast<unsigned char*>(shared);
  release(&e.body);
  e.first_ready = e.ready_count = e.arrived = 0;
  e.alive = e.threads;
  for (Warp& w : e.warps) w.arrived = 0;
  for (unsigned i = 0; i < e.threads; ++i) start_thread(i, shape.block_dim, shape);
  switch_to(&e.main, pop_ready());
}

}  // namespace

void fail(const char* format, ...) {
  std::fputs("simt: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (current != nullptr && current != &engine().main.thread) {
    const dim3 b = current->block, t = current->thread;
    std::fprintf(stderr, " [block %u, %u, %u, thread %u, %u, %u]", b.x, b.y, b.z, t.x, t.y, t.z);
  }
  std::fputs("\n", stderr);
  std::_Exit(1);
}

void set_order(Order order, std::uint32_t seed) {
  engine().order = order;
  engine().random = seed;
}

void set_shared_limit(const void* kernel, std::size_t bytes) { shared_limits[kernel] = bytes; }

void check_shared(const void* kernel, std::size_t bytes) {
  const std::size_t limit = std::max<std::size_t>(shared_limits[kernel], 48 * 1024);
  if (bytes > limit) fail("launch: %zu bytes of shared memory where %zu are allowed", bytes, limit);
}

void run(dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(void*), void* arguments) {
  Engine& e = engine();
  e.threads = block.x * block.y * block.z;
  if (e.threads == 0 || e.threads > kMaxThreads || e.threads % kWarp != 0) {
    fail("a block must have whole warps and at most %u threads, got %u", kMaxThreads, e.threads);
  }
  if (shared_bytes > kMaxShared) fail("shared memory must have at most %zu bytes, got %zu", kMaxShared, shared_bytes);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    fail("a grid must be 1 to 2^31 - 1 by 65535 by 65535 blocks, got %u by %u by %u", grid.x, grid.y, grid.z);
  }
  e.body = body;
  e.arguments = arguments;
  if (__tsan_get_current_fiber != nullptr) e.main.tsan = __tsan_get_current_fiber();
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (e.order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (e.order == Order::kSeeded) {
    for (unsigned i = static_cast<unsigned>(blocks.size()); i > 1; --i)
      std::swap(blocks[i - 1], blocks[next_random(i)]);
  }
  for (const unsigned b : blocks) {
    run_block({{}, {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)}, block, grid, nullptr, shared_bytes, 0});
  }
  forget_blocks();
  current = nullptr;
}

void begin_kernel() { running()->begun = true; }

void sync_block() {
  Engine& e = engine();
  release(&e.arrived);
  meet("__syncthreads", &e.arrived, 0, e.threads, [] {});
  acquire(&e.arrived);
}

void sync_warp() {
  Warp& w = engine().warps[index(running()) / kWarp];
  release(&w);
  meet_warp("__syncwarp", [](Warp&, unsigned) {});
  acquire(&w);
}

Words exchange(const char* instruction, const std::uint32_t* words, unsigned count) {
  Fiber* self = running();
  for (unsigned i = 0; i < count; ++i) self->words[i] = words[i];
  Words shown = engine().warps[index(self) / kWarp].shown;
  meet_warp(instruction, [&](Warp& w, unsigned first) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      for (unsigned i = 0; i < count; ++i) w.shown[lane][i] = engine().fibers[first + lane].words[i];
    }
  });
  return shown;
}

void queue_copy(const Copy& copy) {
  Copies& c = running()->copies;
  if (c.count == Copies::kMax) fail("cp.async: more than %u copies of one thread are in flight", Copies::kMax);
  c.items[(c.first + c.count++) % Copies::kMax] = {copy, c.groups};
}

void cp_async_commit() { ++running()->copies.groups; }

bool take_copy(int groups_left, Copy* copy) {
  Copies& c = running()->copies;
  const Copies::Item& oldest = c.items[c.first];
  if (c.count == 0 || oldest.group >= c.groups - groups_left) return false;
  *copy = oldest.copy;
  c.first = (c.first + 1) % Copies::kMax;
  --c.count;
  return true;
}

}  // namespace simt
