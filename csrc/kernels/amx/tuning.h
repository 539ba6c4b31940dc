// What is still being measured on AMX machines; bench_amx sets it.
#pragma once

namespace ktrt {

struct AmxTuning {
  int k_block = 16;    // tiles of k whose weights stay in the L1 cache while rows pass; 2 KB each
  int a_ahead = 2;     // steps that A is asked for ahead; 0: left to the processor
  int stream_a = 0;    // TILELOADDT1 for A
  int job_rows = 256;  // of one job, at most 512
  int overlap = 1;     // SiLU and weighted sums while tiles multiply
  int wide_down = 1;   // down: all of a thread's columns in one piece
  int quantize_once = 1;            // INT8: tokens are quantised before they are gathered
  int next_a = 1;                   // down: ask for the next job's activations
  int whole_jobs = 1;               // gate and up: split few jobs
  double* phase_seconds = nullptr;  // [3], if asked for: quantising tokens, gate and up, down
};

extern AmxTuning amx_tuning;

}  // namespace ktrt
