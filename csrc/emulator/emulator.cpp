// The fibres, barriers and warp exchanges behind cuda_runtime.h.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

namespace {

constexpr size_t stack_bytes = 128 * 1024;
constexpr int warp_size = 32;

enum class State { ready, at_block_barrier, at_warp_exchange, done };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  State state;
  dim3 index;
  unsigned mask;  // of the warp exchange it waits at
  int phase;      // counts its warp exchanges; two alternate, so that no lane overwrites what another still reads
  alignas(16) unsigned char slots[2][64];  // what it handed in
};

std::vector<std::unique_ptr<Fibre>> fibres;
int live;     // threads of the block that runs
int current;  // the fibre that is running
ucontext_t scheduler;
const std::function<void()>* body;
const char* failure;  // what a fibre did wrong; it cannot throw across its own stack's end
std::vector<unsigned char> shared;

void start() {
  (*body)();
  fibres[current]->state = State::done;
  swapcontext(&fibres[current]->context, &scheduler);
}

void wait(State state) {
  fibres[current]->state = state;
  swapcontext(&fibres[current]->context, &scheduler);
}

// Wakes the warps all of whose awaited lanes have arrived. Returns whether any did.
bool release_warps() {
  bool any = false;
  for (int first = 0; first < live; first += warp_size) {
    unsigned waiting = 0, wanted = 0;
    for (int lane = 0; lane < warp_size && first + lane < live; ++lane) {
      Fibre& fibre = *fibres[first + lane];
      if (fibre.state != State::at_warp_exchange) continue;
      waiting |= 1u << lane;
      wanted |= fibre.mask;
    }
    if (live - first < warp_size) wanted &= (1u << (live - first)) - 1;
    if (waiting == 0 || (wanted & ~waiting) != 0) continue;
    for (int lane = 0; lane < warp_size && first + lane < live; ++lane) {
      if (waiting >> lane & 1) fibres[first + lane]->state = State::ready;
    }
    any = true;
  }
  return any;
}

bool release_block() {
  for (int i = 0; i < live; ++i) {
    if (fibres[i]->state != State::at_block_barrier) return false;
  }
  for (int i = 0; i < live; ++i) fibres[i]->state = State::ready;
  return true;
}

bool all_done() {
  for (int i = 0; i < live; ++i) {
    if (fibres[i]->state != State::done) return false;
  }
  return true;
}

void run_block(dim3 threads) {
  for (int i = 0; i < live; ++i) {
    Fibre& fibre = *fibres[i];
    fibre.state = State::ready;
    fibre.phase = 0;
    fibre.index = dim3(i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y));
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = stack_bytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, start, 0);
  }
  for (int turn = 0; !all_done(); ++turn) {
    for (int k = 0; k < live; ++k) {
      current = turn % 2 == 0 ? k : live - 1 - k;
      if (fibres[current]->state != State::ready) continue;
      threadIdx = fibres[current]->index;
      swapcontext(&scheduler, &fibres[current]->context);
      if (failure) throw std::runtime_error(failure);
    }
    if (!all_done() && !release_warps() && !release_block()) {
      throw std::runtime_error("emulator: threads of a block wait at different barriers");
    }
  }
}

}  // namespace

void run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  live = int(threads.x * threads.y * threads.z);
  while (int(fibres.size()) < live) fibres.push_back(std::make_unique<Fibre>());
  body = &kernel;
  failure = nullptr;
  blockDim = threads;
  gridDim = blocks;
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = dim3(x, y, z);
        shared.assign(shared_bytes, 0xff);  // NaN in every float format: a read before a write shows
        run_block(threads);
      }
    }
  }
}

void* dynamic_shared() { return shared.data(); }

void block_barrier() { wait(State::at_block_barrier); }

int lane() { return current % warp_size; }

void fail(const char* what) {
  failure = what;
  swapcontext(&fibres[current]->context, &scheduler);
  __builtin_unreachable();
}

static void hand_in(unsigned mask, const void* mine, size_t bytes) {
  Fibre& fibre = *fibres[current];
  if (bytes > sizeof(fibre.slots[0])) fail("emulator: a lane hands in too much");
  std::memcpy(fibre.slots[fibre.phase++ % 2], mine, bytes);
  fibre.mask = mask;
  wait(State::at_warp_exchange);
}

void publish(const void* mine, size_t bytes) { hand_in(~0u, mine, bytes); }

const void* published(int lane) {
  int from = current / warp_size * warp_size + lane;
  if (from >= live) fail("emulator: a warp reads from a lane that does not exist");
  return fibres[from]->slots[(fibres[current]->phase - 1) % 2];
}

uint64_t warp_exchange(unsigned mask, uint64_t mine, int source) {
  hand_in(mask, &mine, sizeof(mine));
  uint64_t word;
  std::memcpy(&word, published(source), sizeof(word));
  return word;
}

}  // namespace emulator
