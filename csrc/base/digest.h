// A 64-bit digest of memory that finds damage: flipped bits, lost blocks, other contents.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace ktrt {

// Digest of a block of any length. Not cryptographic. As fast as memory is read, without special
// instructions: the inner loop is that of XXH3, eight sums of 32 × 32-bit products, in which every
// word also enters its neighbour's sum unchanged, so that a change of one word always shows.
std::uint64_t digest(const std::byte* data, std::size_t bytes) noexcept;

// Digest of a whole from its blocks' digests, in order; blocks may be digested by several threads.
std::uint64_t digest_of_digests(std::span<const std::uint64_t> digests) noexcept;

}  // namespace ktrt
