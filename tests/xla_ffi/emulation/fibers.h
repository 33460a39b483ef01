// The threads of a block as fibers, which take turns on one host thread: each runs until it has to
// wait for others. In which order they take their turns changes from round to round.
//
// Sanitizers are told of the fibers. ThreadSanitizer is told of no order between them but that of
// barriers, so that it sees the races that there are between CUDA threads.
//
// Included by cuda_runtime.h.
#pragma once

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes);
}
#endif

#ifdef __x86_64__
// Keeps what a function has to keep on the stack, and goes on with another one. (swapcontext would
// make AddressSanitizer forget what it knows of the other.)
extern "C" void cuda_emulation_switch(void** from, void* to);
asm(R"(
.pushsection .text
.weak cuda_emulation_switch
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection
)");
#endif

namespace cuda_emulation {

inline void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "cuda emulation: %s\n", what);
  std::abort();
}

inline constexpr unsigned kMostThreads = 1024;
inline constexpr size_t kStackBytes = 1 << 19;

// A variable that fibers and their scheduler share, of whose accesses ThreadSanitizer is to learn
// no order. (Another atomic would give one, and take most of the time.)
template <typename T>
class Unordered {
 public:
  Unordered(T value = {}) : value_(value) {}
  operator T() const { return value_.load(std::memory_order_relaxed); }
  Unordered& operator=(T value) {
    value_.store(value, std::memory_order_relaxed);
    return *this;
  }

 private:
  std::atomic<T> value_;
};

// While there is one, ThreadSanitizer sees no accesses: to what the emulation itself keeps, and
// fibers access in turn.
class Unseen {
 public:
#ifdef __SANITIZE_THREAD__
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
};

// The thread whose turn it is.
inline Unordered<uint32_t> running;
inline uint32_t this_thread() { return running; }

// A variable that each thread of a block has one of.
template <typename T>
class PerThread {
 public:
  T& operator*() { return values_[this_thread()]; }
  T* operator->() { return &**this; }

 private:
  T values_[kMostThreads] = {};
};

inline void acquire([[maybe_unused]] void* address) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(address);
#endif
}
inline void release([[maybe_unused]] void* address) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(address);
#endif
}

class Fibers {
 public:
  // Runs a function once for each thread, until all have returned.
  void run(unsigned count, const std::function<void()>& body) {
    check(count <= kMostThreads, "there are more threads than a block can have");
    body_ = &body;
    release(&begun_);
#ifdef __SANITIZE_THREAD__
    scheduler_.tsan = __tsan_get_current_fiber();
#endif
    for (unsigned i = 0; i < count; ++i) {
      if (!fibers_[i].stack) make(fibers_[i]);
      fibers_[i].ended = false;
    }
    unsigned left = count, in_vain = 0;
    while (left) {
      const unsigned first = random_() % count, step = random_() % 2 ? 1 : count - 1;
      for (unsigned k = 0; k < count; ++k) {
        Fiber& fiber = fibers_[(first + k * uint64_t{step}) % count];
        if (fiber.ended) continue;
        running = static_cast<uint32_t>(&fiber - fibers_);
        in_vain_ = false;
        change(scheduler_, fiber);
        left -= fiber.ended;
        in_vain = in_vain_ ? in_vain + 1 : 0;
        check(in_vain <= 2 * count, "the threads of a block wait for ever");
      }
    }
    acquire(&ended_);
  }

  // Lets the other threads of the block go on until there is what a thread waits for.
  template <typename Condition>
  void wait_until(const Condition& condition) {
    for (bool again = false; !condition(); again = true) {
      in_vain_ = again;
      change(fibers_[this_thread()], scheduler_);
    }
  }

 private:
  struct Fiber {
#ifdef __x86_64__
    void* context = nullptr;  // the top of its stack
#else
    ucontext_t context;
#endif
    const void* stack = nullptr;
    size_t stack_bytes = 0;
    void *tsan = nullptr, *fake_stack = nullptr;
    Unordered<bool> ended;
  };

  static void make(Fiber& fiber) {
    // Behind a page that is not to be touched.
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(memory != MAP_FAILED && mprotect(memory, 4096, PROT_NONE) == 0, "no memory for a stack");
    fiber.stack = static_cast<std::byte*>(memory) + 4096;
    fiber.stack_bytes = kStackBytes - 4096;
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(static_cast<std::byte*>(memory) + kStackBytes);
    top[-2] = reinterpret_cast<void*>(&Fibers::begin);  // where the switch returns to
    fiber.context = top - 8;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
    fiber.context.uc_stack.ss_size = fiber.stack_bytes;
    makecontext(&fiber.context, &Fibers::begin, 0);
#endif
#ifdef __SANITIZE_THREAD__
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }

  // What a fiber runs: the function of each launch, one after the other.
  static void begin();

  __attribute__((noinline, no_sanitize("thread"))) static void change(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.tsan, 1);  // which orders nothing
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef __x86_64__
    cuda_emulation_switch(&from.context, to.context);
#else
    swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  }

  Fiber scheduler_, fibers_[kMostThreads];
  const std::function<void()>* body_ = nullptr;
  Unordered<bool> in_vain_;         // whether who waited is waiting still
  uint64_t begun_ = 0, ended_ = 0;  // whose addresses stand for the begin and the end of a launch
  std::minstd_rand random_{1};
};

inline Fibers fibers;

inline void Fibers::begin() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &fibers.scheduler_.stack,
                                  &fibers.scheduler_.stack_bytes);
#endif
  for (;;) {
    acquire(&fibers.begun_);
    (*fibers.body_)();
    release(&fibers.ended_);
    Fiber& self = fibers.fibers_[this_thread()];
    self.ended = true;
    change(self, fibers.scheduler_);
  }
}

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}

  void arrive_and_wait() {
    // One of two, since who has passed this phase may arrive at the next before all have left.
    uint64_t* const order = &orders_[phase_ % 2];
    release(order);
    meet();
    acquire(order);
  }
  // Waits for the others, and orders no memory.
  void meet() {
    const unsigned phase = phase_;
    arrived_ = arrived_ + 1;
    if (arrived_ == count_) {
      arrived_ = 0;
      phase_ = phase + 1;
    } else {
      fibers.wait_until([&] { return phase_ != phase; });
    }
  }

 private:
  const unsigned count_;
  Unordered<unsigned> arrived_, phase_;
  uint64_t orders_[2] = {};
};

}  // namespace cuda_emulation
