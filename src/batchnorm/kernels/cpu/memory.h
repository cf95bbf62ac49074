// Memory for large outputs.
//
// A large tensor is mapped afresh at every call by torch's allocator, and faulting its pages in
// costs several times what filling them does. Blocks given back here are kept, on huge pages, for
// the next output of their size; of those that nobody asks for the kernel may take the pages when
// it needs memory.
#pragma once

#include <cstdint>

namespace batchnorm {

// Null where the system has no pages to give.
void* take_block(int64_t bytes);
void give_block(void* data, int64_t bytes);

// Bytes in blocks that are in use, and in blocks that are kept.
struct BlockUse { int64_t live, kept; };
BlockUse block_use();

}  // namespace batchnorm
