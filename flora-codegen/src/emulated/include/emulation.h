// A thread block of CUDA on one thread of the processor. Each CUDA thread is a fiber that runs until it waits at a barrier; blocks
// run one after the other, in the order in which a card hands them out. What a card leaves open is made as bad as it may be: every
// other phase between two barriers runs its threads backwards, so that a missing barrier shows.
//
// Under ThreadSanitizer each fiber is a thread of its own and only barriers order them: two accesses that nothing orders are a race,
// whichever came first. Under AddressSanitizer what lies beside a buffer, and beside a shared array, is poisoned.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define FLORA_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FLORA_UNCHECKED __attribute__((no_sanitize("address"), noinline))
#else
#define FLORA_UNCHECKED __attribute__((noinline))
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};

// The running fiber's; set whenever another one goes on.
inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace emulation {

constexpr unsigned warp_size = 32;
constexpr size_t stack_bytes = 256 * 1024;
constexpr size_t guard_bytes = 4096;
// Turns of a block between two barriers. A thread that asks for what others write takes one for each question.
constexpr unsigned long patience = 1u << 16;

enum class State { ready, at_warp_barrier, at_block_barrier, done };

#if defined(__x86_64__)
// Where a thread of execution that doesn't run goes on: the top of its stack, which has what calls keep and where to return to. The
// system's own switch asks the kernel for the signal mask each time, and a kernel of fragments switches for every product.
using Context = void*;
__attribute__((naked, noinline, no_sanitize("thread"), no_sanitize("address"))) inline void switch_context(Context*, Context*) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq (%rsi), %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
// A context that begins with `body`, which never returns.
inline void make_context(Context& context, void* stack, size_t bytes, void (*body)()) {
    // As after a call: the stack is 8 off a multiple of 16.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(body);
    for (int kept = 0; kept < 6; ++kept) *--top = nullptr;
    context = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
inline void make_context(Context& context, void* stack, size_t bytes, void (*body)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
}
#endif

struct Fiber {
    Context context;
    State state;
    // Operations of the whole warp that this lane took part in: all lanes of a warp have the same number wherever they meet.
    unsigned long collectives;
    // Those of them in which lanes showed one another what they have.
    unsigned long exchanges;
    uint3 index;
    void* stack;
    void* identity;
};

// What the launch is told: the layout is known to the caller.
struct Buffer {
    void* start;
    size_t bytes;
};
struct SharedArray {
    size_t offset, bytes;
};
struct Launch {
    unsigned grid[3], block[3];
    void** arguments;
    const Buffer* buffers;
    size_t buffer_count;
    const SharedArray* shared_arrays;
    size_t shared_array_count;
    size_t shared_bytes;
};

struct Block {
    Context scheduler;
    // More than any earlier block's exchanges.
    unsigned long first_exchange;
    Fiber* fibers;
    unsigned threads;
    Fiber* running;
    void* scheduler_identity;
    void* scheduler_stack;
    size_t scheduler_stack_bytes;
    unsigned char* shared;
    void (*body)(void**);
    void** arguments;
    const char* failure;
    unsigned long turns;
    bool backwards;
    // What barriers are to a sanitizer: two for each, used in turn, because who leaves one may be at the next before others have left.
    char block_barriers[2], warp_barriers[32][2], launch_end;
    unsigned char block_turn, warp_turns[32];
};
inline Block block;

// Bytes around a buffer that nobody may touch; the caller leaves them.
constexpr size_t edge_bytes = 256;

FLORA_UNCHECKED inline void fail(const char* reason) {
    if (block.failure == nullptr) block.failure = reason;
}

FLORA_UNCHECKED inline unsigned lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warp_size;
}

FLORA_UNCHECKED inline void give_way(State state) {
    Fiber& self = *block.running;
    self.state = state;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(block.scheduler_identity, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fake, block.scheduler_stack, block.scheduler_stack_bytes);
#endif
    switch_context(&self.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Releases what came before, waits, and acquires what others released.
FLORA_UNCHECKED inline void meet(State state, void* barrier) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(barrier);
#endif
    give_way(state);
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(barrier);
#endif
    (void)barrier;
}

FLORA_UNCHECKED inline void meet_block() {
    meet(State::at_block_barrier, &block.block_barriers[block.block_turn]);
}

FLORA_UNCHECKED inline void meet_warp() {
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned warp = thread / warp_size;
    meet(State::at_warp_barrier, &block.warp_barriers[warp][block.warp_turns[warp]]);
}

FLORA_UNCHECKED inline void collective() {
    block.running->collectives += 1;
}

FLORA_UNCHECKED inline void begin() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, const_cast<const void**>(&block.scheduler_stack), &block.scheduler_stack_bytes);
#endif
    block.body(block.arguments);
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&block.launch_end);
#endif
    give_way(State::done);
}

FLORA_UNCHECKED inline void go_on(Fiber& fiber) {
    block.running = &fiber;
    threadIdx = fiber.index;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.identity, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, stack_bytes);
#endif
    switch_context(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Lanes that meet have taken part in as many of their warp's operations; those that are done, in less.
FLORA_UNCHECKED inline void compare_lanes(unsigned first, unsigned end) {
    const Fiber* other = nullptr;
    for (unsigned thread = first; thread < end; ++thread) {
        const Fiber& fiber = block.fibers[thread];
        if (fiber.state == State::done) continue;
        if (other != nullptr && other->collectives != fiber.collectives)
            fail("lanes of a warp meet after different numbers of its fragments' operations");
        other = &fiber;
    }
}

// Lets every lane of a warp run until each waits for the whole block, is done, or asks for what others have to write.
FLORA_UNCHECKED inline void run_warp(unsigned first, unsigned end) {
    while (block.failure == nullptr) {
        unsigned ready = 0, at_warp = 0, at_block = 0;
        for (unsigned turn = first; turn < end; ++turn) {
            Fiber& fiber = block.fibers[block.backwards ? first + end - 1 - turn : turn];
            if (fiber.state == State::ready) go_on(fiber);
            if (block.failure != nullptr) return;
            ready += fiber.state == State::ready;
            at_warp += fiber.state == State::at_warp_barrier;
            at_block += fiber.state == State::at_block_barrier;
        }
        if (ready != 0) return;
        compare_lanes(first, end);
        if (at_warp == 0) return;
        if (at_block != 0) fail("lanes of a warp wait at a barrier of the warp and at one of the block");
        for (unsigned thread = first; thread < end; ++thread)
            if (block.fibers[thread].state == State::at_warp_barrier) block.fibers[thread].state = State::ready;
        block.warp_turns[first / warp_size] ^= 1;
    }
}

FLORA_UNCHECKED inline void run_block() {
    while (block.failure == nullptr) {
        unsigned waiting = 0, done = 0;
        const unsigned warps = (block.threads + warp_size - 1) / warp_size;
        for (unsigned turn = 0; turn < warps; ++turn) {
            const unsigned warp = block.backwards ? warps - 1 - turn : turn;
            const unsigned first = warp * warp_size;
            const unsigned end = first + warp_size < block.threads ? first + warp_size : block.threads;
            run_warp(first, end);
        }
        for (unsigned thread = 0; thread < block.threads; ++thread) {
            waiting += block.fibers[thread].state == State::at_block_barrier;
            done += block.fibers[thread].state == State::done;
        }
        if (done == block.threads) return;
        if (waiting + done == block.threads) {
            for (unsigned thread = 0; thread < block.threads; ++thread)
                if (block.fibers[thread].state == State::at_block_barrier) block.fibers[thread].state = State::ready;
            block.block_turn ^= 1;
            block.backwards = !block.backwards;
            block.turns = 0;
        } else if (++block.turns > patience) {
            fail("threads wait for a number that no block writes");
        }
    }
}

FLORA_UNCHECKED inline void* map(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::fputs("no memory for an emulated block's threads\n", stderr);
        std::abort();
    }
    return memory;
}

// The stacks of a block's fibers, each with a page below that nobody may touch.
FLORA_UNCHECKED inline void make_fibers(const Launch& launch, unsigned char* stacks) {
    for (unsigned thread = 0; thread < block.threads; ++thread) {
        Fiber& fiber = block.fibers[thread];
        fiber.state = State::ready;
        fiber.collectives = 0;
        fiber.exchanges = 0;
        fiber.index = {thread % launch.block[0], thread / launch.block[0] % launch.block[1],
                       thread / (launch.block[0] * launch.block[1])};
        fiber.stack = stacks + thread * (stack_bytes + guard_bytes) + guard_bytes;
        make_context(fiber.context, fiber.stack, stack_bytes, begin);
#if defined(__SANITIZE_THREAD__)
        fiber.identity = __tsan_create_fiber(0);
#endif
    }
}

#if defined(__SANITIZE_ADDRESS__)
FLORA_UNCHECKED inline void poison(const Launch& launch, bool on) {
    for (size_t at = 0; at < launch.buffer_count; ++at) {
        unsigned char* start = static_cast<unsigned char*>(launch.buffers[at].start);
        unsigned char* end = start + launch.buffers[at].bytes;
        if (on) {
            __asan_poison_memory_region(start - edge_bytes, edge_bytes);
            __asan_poison_memory_region(end, edge_bytes);
        } else {
            __asan_unpoison_memory_region(start - edge_bytes, edge_bytes);
            __asan_unpoison_memory_region(end, edge_bytes);
        }
    }
}
#endif

// Runs every block of the launch. Gives what went wrong, or null.
FLORA_UNCHECKED inline const char* run(void (*body)(void**), const Launch& launch) {
    block.body = body;
    block.arguments = launch.arguments;
    block.threads = launch.block[0] * launch.block[1] * launch.block[2];
    block.failure = nullptr;
    blockDim = {launch.block[0], launch.block[1], launch.block[2]};
    gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
    const size_t stacks_bytes = block.threads * (stack_bytes + guard_bytes);
    const size_t shared_bytes = (launch.shared_bytes + 2 * guard_bytes - 1) / guard_bytes * guard_bytes;
    block.fibers = static_cast<Fiber*>(std::malloc(block.threads * sizeof(Fiber)));
    unsigned char* stacks = nullptr;
#if defined(__SANITIZE_THREAD__)
    block.scheduler_identity = __tsan_get_current_fiber();
#elif defined(__SANITIZE_ADDRESS__)
    poison(launch, true);
#endif
    for (unsigned z = 0; z < launch.grid[2]; ++z)
        for (unsigned y = 0; y < launch.grid[1]; ++y)
            for (unsigned x = 0; x < launch.grid[0] && block.failure == nullptr; ++x) {
                blockIdx = {x, y, z};
                block.turns = 0;
                // Stacks and shared memory of a block are no other block's: to a sanitizer they are new.
                block.shared = static_cast<unsigned char*>(map(shared_bytes));
                if (stacks == nullptr) {
                    stacks = static_cast<unsigned char*>(map(stacks_bytes));
                    for (unsigned thread = 0; thread < block.threads; ++thread)
                        mprotect(stacks + thread * (stack_bytes + guard_bytes), guard_bytes, PROT_NONE);
                }
                for (size_t at = 0; at < launch.shared_bytes; ++at) block.shared[at] = 0xff;
#if defined(__SANITIZE_ADDRESS__)
                __asan_poison_memory_region(block.shared, shared_bytes);
                for (size_t at = 0; at < launch.shared_array_count; ++at)
                    __asan_unpoison_memory_region(block.shared + launch.shared_arrays[at].offset, launch.shared_arrays[at].bytes);
#endif
                block.first_exchange += 1ul << 32;
                make_fibers(launch, stacks);
                run_block();
#if defined(__SANITIZE_THREAD__)
                for (unsigned thread = 0; thread < block.threads; ++thread) __tsan_destroy_fiber(block.fibers[thread].identity);
                munmap(stacks, stacks_bytes);
                stacks = nullptr;
#elif defined(__SANITIZE_ADDRESS__)
                __asan_unpoison_memory_region(block.shared, shared_bytes);
                __asan_unpoison_memory_region(stacks, stacks_bytes);
#endif
                munmap(block.shared, shared_bytes);
            }
    if (stacks != nullptr) munmap(stacks, stacks_bytes);
    std::free(block.fibers);
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&block.launch_end);
#elif defined(__SANITIZE_ADDRESS__)
    poison(launch, false);
#endif
    return block.failure;
}

// The arguments as a launch of CUDA's driver passes them: a pointer to each.
template <class T> struct Plain { using type = T; };
template <class T> struct Plain<const T> { using type = T; };
template <size_t... at> struct Places {};
template <size_t count, size_t... at> struct PlacesOf : PlacesOf<count - 1, count - 1, at...> {};
template <size_t... at> struct PlacesOf<0, at...> { using type = Places<at...>; };
template <class... Parameters, size_t... at>
inline void call(void (*kernel)(Parameters...), void** arguments, Places<at...>) {
    kernel(*static_cast<typename Plain<Parameters>::type*>(arguments[at])...);
}
template <class... Parameters> inline void call(void (*kernel)(Parameters...), void** arguments) {
    call(kernel, arguments, typename PlacesOf<sizeof...(Parameters)>::type{});
}

}  // namespace emulation
