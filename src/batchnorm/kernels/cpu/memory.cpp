#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace batchnorm {
namespace {

constexpr int64_t page = 4096;
constexpr int64_t huge_page = 2 << 20;
// A step of a deep network gives back some hundred blocks, and takes every one again in the next.
constexpr int64_t step_blocks = 1024;

struct Block {
  void* data;
  int64_t bytes;
  int64_t turn;      // how many had been given back before it
  bool reclaimable;  // the kernel may take its pages
};

struct Blocks {
  std::mutex mutex;
  std::vector<Block> free;  // the last given is the last
  BlockUse use{};
  int64_t most = 0;   // bytes live at once
  int64_t turns = 0;  // blocks given back so far
};

// Never destroyed: tensors may outlive every destructor.
Blocks& blocks() {
  static Blocks* all = new Blocks;
  return *all;
}

int64_t rounded(int64_t bytes) { return (bytes + page - 1) / page * page; }

void* map(int64_t bytes) {
  // Aligned to a huge page: what sticks out on either side is returned.
  const int64_t reach = bytes + huge_page;
  char* raw = (char*)mmap(nullptr, reach, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* data = (char*)(((uintptr_t)raw + huge_page - 1) / huge_page * huge_page);
  if (data > raw) munmap(raw, data - raw);
  if (raw + reach > data + bytes) munmap(data + bytes, raw + reach - (data + bytes));
#if defined(MADV_HUGEPAGE)
  // A kernel without huge pages refuses; the pages are then ordinary ones.
  (void)madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

// Not at once: at the next write to a page that the kernel may take, the processor has to mark it
// again, which for a small tensor costs as much as normalising it.
void leave_to_kernel(Blocks& b) {
#if defined(MADV_FREE)
  for (Block& block : b.free) {
    if (b.turns - block.turn <= step_blocks) break;
    if (!block.reclaimable) (void)madvise(block.data, block.bytes, MADV_FREE);
    block.reclaimable = true;
  }
#endif
}

}  // namespace

void* take_block(int64_t bytes) {
  bytes = rounded(bytes);
  Blocks& b = blocks();
  {
    std::lock_guard<std::mutex> lock(b.mutex);
    b.use.live += bytes;
    b.most = std::max(b.most, b.use.live);
    for (size_t i = b.free.size(); i-- > 0;)
      if (b.free[i].bytes == bytes) {
        void* data = b.free[i].data;
        b.free.erase(b.free.begin() + i);
        b.use.kept -= bytes;
        return data;
      }
  }
  void* data = map(bytes);
  if (!data) {
    std::lock_guard<std::mutex> lock(b.mutex);
    b.use.live -= bytes;
  }
  return data;
}

void give_block(void* data, int64_t bytes) {
  bytes = rounded(bytes);
  Blocks& b = blocks();
  std::vector<Block> dropped;
  {
    std::lock_guard<std::mutex> lock(b.mutex);
    b.use.live -= bytes;
    b.use.kept += bytes;
    b.free.push_back({data, bytes, b.turns++, false});
    // Never more in all than was once in use: sizes that are no longer asked for make room.
    while (b.use.live + b.use.kept > b.most) {
      dropped.push_back(b.free.front());
      b.use.kept -= b.free.front().bytes;
      b.free.erase(b.free.begin());
    }
    leave_to_kernel(b);
  }
  for (const Block& d : dropped) munmap(d.data, d.bytes);
}

BlockUse block_use() {
  Blocks& b = blocks();
  std::lock_guard<std::mutex> lock(b.mutex);
  return b.use;
}

}  // namespace batchnorm
