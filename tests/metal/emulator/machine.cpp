// A GPU of one core that runs a kernel's threadgroups one after the other.
//
// Each thread of a threadgroup is a fiber, which runs until it meets other threads: in an operation of its
// simdgroup of 32, or at a barrier. The order in which threads and threadgroups run is shuffled by a seed.
// Buffers end at a page that cannot be touched. In a kernel compiled with tracing, each load and store is
// looked at: within which buffer, of bytes that are there, written before they are read, once for outputs,
// and for threadgroup memory ordered by a barrier against every other thread that touches the same byte.
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <xmmintrin.h>

typedef unsigned int uint;
typedef uint64_t u64;

struct Size { uint x, y, z; };
struct Place {
  Size in_grid, in_group, group, threads, grid, groups;
  uint index, lane, simdgroup, simdgroups;
};
struct Buffer {  // as in machine.py
  char* data;
  u64 size;
  uint8_t* marks;  // tracing: a byte for each. Inputs: how often loaded (NOT_THERE: never to be). Outputs: written
  u64 output;
};
struct Job {
  void (*body)(void** buffers, const Place& place);
  Buffer* buffers;
  u64 count;
  Size grid, threadgroup;
  u64 seed, traced;
  char *shared, *shared_end, *image, *image_end;  // threadgroup memory, and the kernel's whole library
  u64 simd_operations, barriers;
  char message[256];
};

enum { RUNS, EXCHANGES, WAITS, WAITS_SIMD, ENDED };
enum { LANES = 32, MAX_THREADS = 1024, STACK = 64 << 10, PAGE = 4096, MAX_SHARED = 32768 };
enum { NOT_THERE = 255, MOST = 250 };
enum { NOBODY = -1, SEVERAL = -2 };

struct Fiber {
  void* sp;
  char* stack;
  int state;
  bool fence;
  const void* site;
  u64 value;
  Place place;
};
// Who touched a byte of threadgroup memory since the last barrier.
struct Touch {
  int writer, reader;       // threads
  int reader_group;         // simdgroup of all readers
  u64 wrote, read;          // the barrier count of the threadgroup then
  u64 wrote_simd, read_simd;  // and that of the simdgroup
  bool initialised;
};

static Fiber fibers[MAX_THREADS];
static Fiber* current;
static Job* job;
static uint threads;
static void* scheduler;
static bool failed, active;
static u64 values[MAX_THREADS / LANES][LANES];
static u64 epoch, simd_epoch[MAX_THREADS / LANES], random_state;
static Touch touches[MAX_SHARED];
static void* pointers[64];  // the buffers, as the kernel is handed them

extern "C" void switch_stack(void** save, void* to);
// The System V ABI's callee-saved registers; no signal mask, so a switch costs nanoseconds.
asm(".text\n.globl switch_stack\nswitch_stack:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");

static void fail(const char* what) {
  if (failed) return;
  failed = true;
  const Place* p = current ? &current->place : 0;
  if (p)
    snprintf(job->message, sizeof job->message, "%s (threadgroup %u,%u,%u thread %u)", what, p->group.x,
             p->group.y, p->group.z, p->index);
  else
    snprintf(job->message, sizeof job->message, "%s", what);
}

static void stop(const char* what) {  // in a fiber: for good
  fail(what);
  void* nowhere;
  switch_stack(&nowhere, scheduler);
}

static u64 drawn() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return random_state >> 33;
}

static void shuffle(uint* order, uint n) {
  for (uint i = 0; i < n; i++) order[i] = i;
  if (!job->seed) return;
  for (uint i = n; i > 1; i--) {
    uint j = drawn() % i, t = order[i - 1];
    order[i - 1] = order[j];
    order[j] = t;
  }
}

// ------------------------------------------------------------------------------- what a kernel calls

extern "C" void emulator_exchange(u64 value, u64* all, const void* site) {
  Fiber* f = current;
  f->value = value, f->site = site, f->state = EXCHANGES;
  switch_stack(&f->sp, scheduler);
  memcpy(all, values[f->place.simdgroup], sizeof values[0]);
}

extern "C" void emulator_barrier(bool whole, bool fence, const void* site) {
  Fiber* f = current;
  f->site = site, f->fence = fence, f->state = whole ? WAITS : WAITS_SIMD;
  switch_stack(&f->sp, scheduler);
}

extern "C" uint emulator_lane() { return current->place.lane; }

// ------------------------------------------------------------------------------------------- tracing

static bool ordered(int other, u64 then, u64 simd_then) {
  const Place& p = current->place;
  if (other == (int)p.index || then < epoch) return true;
  return other >= 0 && other / LANES == (int)p.simdgroup && simd_then < simd_epoch[p.simdgroup];
}

static void touch_shared(u64 at, uint size, bool store) {
  const Place& p = current->place;
  for (uint i = 0; i < size; i++) {
    Touch& t = touches[at + i];
    if (!store && !t.initialised) return stop("threadgroup memory is read before it is written");
    if (t.writer != NOBODY && !ordered(t.writer, t.wrote, t.wrote_simd))
      return stop("two threads touch a byte of threadgroup memory without a barrier between them");
    if (store) {
      if (t.reader != NOBODY && t.read == epoch && t.reader != (int)p.index) {
        bool within = t.reader_group == (int)p.simdgroup && t.read_simd < simd_epoch[p.simdgroup];
        if (!within) return stop("threadgroup memory is written while another thread may still read it");
      }
      t.writer = (int)p.index, t.wrote = epoch, t.wrote_simd = simd_epoch[p.simdgroup];
      t.reader = NOBODY;
      t.initialised = true;
    } else {
      bool fresh = t.reader == NOBODY || t.read < epoch;
      t.reader = fresh || t.reader == (int)p.index ? (int)p.index : SEVERAL;
      t.reader_group = fresh || t.reader_group == (int)p.simdgroup ? (int)p.simdgroup : SEVERAL;
      t.read = epoch, t.read_simd = simd_epoch[p.simdgroup];
    }
  }
}

static void touch(char* address, uint size, bool store) {
  if (!active || failed) return;
  if (address >= current->stack && address < current->stack + STACK) return;
  if (address >= job->shared && address < job->shared_end) {
    if (address + size > job->shared_end) return stop("an access leaves threadgroup memory");
    return touch_shared(address - job->shared, size, store);
  }
  for (u64 i = 0; i < job->count; i++) {
    Buffer& b = job->buffers[i];
    if (address + size <= b.data || address >= b.data + b.size) continue;
    if (address < b.data || address + size > b.data + b.size) return stop("an access leaves its buffer");
    if (store != (bool)b.output) return stop(store ? "an input is written" : "an output is read");
    uint8_t* marks = b.marks + (address - b.data);
    for (uint j = 0; j < size; j++) {
      if (store && marks[j]) return stop("an output is written twice");
      if (!store && marks[j] == NOT_THERE) return stop("what lies between the rows of a view is read");
      if (marks[j] < MOST) marks[j]++;
    }
    return;
  }
  if (store) return stop("a store outside of every buffer");
  if (address >= job->image && address < job->image_end) return;  // constant tables
  if (address >= (char*)pointers && address < (char*)(pointers + 64)) return;
  stop("a load outside of every buffer");
}

#define HOOKS(size)                                                                         \
  extern "C" void __sanitizer_cov_load##size(void* p) { touch((char*)p, size, false); }  \
  extern "C" void __sanitizer_cov_store##size(void* p) { touch((char*)p, size, true); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)

// ------------------------------------------------------------------------------------------- running

static void run_thread() {
  const Place place = current->place;
  job->body(pointers, place);
  current->state = ENDED;
  void* nowhere;
  switch_stack(&nowhere, scheduler);
}

static void prepare(const Place& group) {
  Size n = group.threads;
  for (uint i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.place = group;
    f.place.index = i, f.place.lane = i % LANES, f.place.simdgroup = i / LANES;
    f.place.in_group = {i % n.x, i / n.x % n.y, i / (n.x * n.y)};
    f.place.in_grid = {group.in_grid.x + f.place.in_group.x, group.in_grid.y + f.place.in_group.y,
                       group.in_grid.z + f.place.in_group.z};
    f.state = RUNS;
    if (!f.stack) f.stack = (char*)mmap(0, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void** sp = (void**)(f.stack + STACK - 64);
    *--sp = 0;
    *--sp = (void*)run_thread;
    for (int r = 0; r < 6; r++) *--sp = 0;
    f.sp = sp;
  }
  epoch++;
  memset(job->shared, 0xFF, job->shared_end - job->shared);  // NaN
  for (long i = 0; i < job->shared_end - job->shared; i++) touches[i] = {NOBODY, NOBODY, NOBODY, 0, 0, 0, 0, false};
}

// All lanes of a simdgroup that meet must come from one place in the text.
static bool met(uint first, uint end, int state, const char* mixed, const char* missing) {
  uint here = 0, fenced = 0;
  const void* site = 0;
  for (uint i = first; i < end; i++) {
    if (fibers[i].state != state) continue;
    if (here++ && fibers[i].site != site) return current = &fibers[i], fail(mixed), false;
    site = fibers[i].site, fenced += fibers[i].fence;
  }
  if (!here) return false;
  if (here != end - first) return current = &fibers[first], fail(missing), false;
  return true;
}

static bool step_simdgroups() {
  bool moved = false;
  for (uint first = 0; first < threads && !failed; first += LANES) {
    uint end = first + LANES < threads ? first + LANES : threads, group = first / LANES;
    uint full = first + LANES;
    if (met(first, full, EXCHANGES, "lanes of a simdgroup meet in different operations",
            "an operation of a simdgroup with inactive lanes")) {
      for (uint i = first; i < end; i++) values[group][i - first] = fibers[i].value;
      job->simd_operations++;
    } else if (failed || !met(first, full, WAITS_SIMD, "lanes of a simdgroup wait at different barriers",
                              "a barrier that not all lanes of a simdgroup reach")) {
      continue;
    } else if (fibers[first].fence) {
      simd_epoch[group]++;
    }
    for (uint i = first; i < end; i++) fibers[i].state = RUNS;
    moved = true;
  }
  return moved;
}

static void run_threadgroup(const Place& group) {
  threads = group.threads.x * group.threads.y * group.threads.z;
  for (uint i = threads; i < MAX_THREADS; i++) fibers[i].state = ENDED;
  prepare(group);
  uint order[MAX_THREADS];
  while (!failed) {
    shuffle(order, threads);
    for (uint i = 0; i < threads && !failed; i++) {
      if (fibers[order[i]].state != RUNS) continue;
      current = &fibers[order[i]];
      active = true;
      switch_stack(&scheduler, current->sp);
      active = false;
    }
    if (failed || step_simdgroups()) continue;
    uint ended = 0;
    for (uint i = 0; i < threads; i++) ended += fibers[i].state == ENDED;
    if (ended == threads) return;
    if (failed || !met(0, threads, WAITS, "threads wait at different barriers",
                       "a barrier that not all threads of the threadgroup reach"))
      continue;
    if (fibers[0].fence) epoch++;
    for (uint i = 0; i < threads; i++) fibers[i].state = RUNS;
    job->barriers++;
  }
}

static uint least(uint a, uint b) { return a < b ? a : b; }

static void run_grid() {
  Size g = job->grid, t = job->threadgroup;
  Size n = {(g.x + t.x - 1) / t.x, (g.y + t.y - 1) / t.y, (g.z + t.z - 1) / t.z};
  u64 total = (u64)n.x * n.y * n.z, start = job->seed ? drawn() % total : 0;
  for (u64 k = 0; k < total && !failed; k++) {
    u64 i = job->seed & 1 ? (start + total - k) % total : (start + k) % total;
    Place p = {};
    p.group = {(uint)(i % n.x), (uint)(i / n.x % n.y), (uint)(i / n.x / n.y)};
    p.in_grid = {p.group.x * t.x, p.group.y * t.y, p.group.z * t.z};
    p.threads = {least(t.x, g.x - p.in_grid.x), least(t.y, g.y - p.in_grid.y), least(t.z, g.z - p.in_grid.z)};
    p.grid = g, p.groups = n;
    p.simdgroups = (p.threads.x * p.threads.y * p.threads.z + LANES - 1) / LANES;
    run_threadgroup(p);
  }
}

static void on_signal(int number, siginfo_t*, void*) {
  active = false;
  stop(number == SIGILL || number == SIGTRAP ? "an overflow, a shift too far or an index outside of its array"
                                             : "a page is touched that lies outside of every buffer");
}

extern "C" int emulator_run(Job* given) {
  static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  static char handler_stack[64 << 10];
  job = given, current = 0, failed = false, random_state = job->seed;
  job->message[0] = 0;
  if ((u64)job->threadgroup.x * job->threadgroup.y * job->threadgroup.z > MAX_THREADS)
    return fail("a threadgroup has at most 1024 threads"), 1;
  if (job->shared_end - job->shared > MAX_SHARED)
    return fail("a threadgroup has at most 32768 bytes of memory"), 1;
  if (job->count > 64) return fail("a kernel has at most 64 buffers"), 1;
  for (u64 i = 0; i < job->count; i++) pointers[i] = job->buffers[i].data;
  struct sigaction ours = {}, before[5];
  stack_t alternate = {}, stack_before;
  alternate.ss_sp = handler_stack, alternate.ss_size = sizeof handler_stack;
  sigaltstack(&alternate, &stack_before);
  ours.sa_sigaction = on_signal;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 5; i++) sigaction(signals[i], &ours, &before[i]);
  uint control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);  // float32 below the normal range is zero, as on Apple's GPUs
  run_grid();
  _mm_setcsr(control);
  for (int i = 0; i < 5; i++) sigaction(signals[i], &before[i], 0);
  sigaltstack(&stack_before, 0);
  return failed;
}

// Memory between pages that cannot be touched, filled with NaN; its end is at the end of a page, or as near
// as 16 bytes allow.
extern "C" char* emulator_allocate(u64 size) {
  u64 pages = (size + PAGE - 1) / PAGE * PAGE;
  char* p = (char*)mmap(0, pages + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return 0;
  mprotect(p, PAGE, PROT_NONE);
  mprotect(p + PAGE + pages, PAGE, PROT_NONE);
  char* data = p + PAGE + (pages - size) / 16 * 16;
  memset(p + PAGE, 0xFF, pages);
  return data;
}

extern "C" void emulator_free(char* data, u64 size) {
  u64 pages = (size + PAGE - 1) / PAGE * PAGE;
  munmap(data - (pages - size) / 16 * 16 - PAGE, pages + 2 * PAGE);
}
