// Faults in words: what is wrong, in which kernel, block and thread, on which line.
#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "cuda_on_host/executor.h"

namespace tk::cuda::host {
namespace {

// Where a signal found a kernel, if one did; and who had asked for signals before.
uint32_t interrupted = 0;
struct sigaction before[2];
constexpr int kSignals[] = {SIGSEGV, SIGBUS};

const Dl_info& object() {
  static const Dl_info info = [] {
    Dl_info found{};
    dladdr(reinterpret_cast<void*>(&object), &found);
    return found;
  }();
  return info;
}

// From the root of the repository on, without what the compiler adds.
std::string shortened(std::string path) {
  path = path.substr(0, path.find_first_of(" \n"));
  for (const char* folder : {"/csrc/", "/tests/"}) {
    if (const size_t at = path.rfind(folder); at != std::string::npos) return path.substr(at + 1);
  }
  return path;
}

// A line that somebody wrote into a kernel, not one of launch.cuh or of this executor.
bool is_of_a_kernel(const std::string& place) {
  const std::string name = place.substr(place.rfind('/') + 1);
  return name.rfind("launch", 0) != 0 &&
         (name.find(".cu") != std::string::npos || place.rfind("csrc/", 0) == 0);
}

// The innermost line of a kernel among instructions and what was inlined there.
std::string ask(const std::vector<uint32_t>& codes) {
  std::string command = "LD_PRELOAD= addr2line -i -e '" + std::string(object().dli_fname) + "'";
  for (const uint32_t code : codes) {
    char text[24];
    std::snprintf(text, sizeof text, " 0x%x", code);
    command += text;
  }
  std::string found = "no line of a kernel";
  FILE* answer = popen(command.c_str(), "r");
  if (answer == nullptr) return found;
  char line[1024];
  bool done = false;
  while (std::fgets(line, sizeof line, answer) != nullptr) {
    const std::string place = shortened(line);
    if (!done && is_of_a_kernel(place)) {
      found = place;
      done = true;
    }
  }
  pclose(answer);
  return found;
}

// The instructions that a stack is in the middle of: its frames, from `frame` outwards.
void walk(const char* stack, const uint64_t* frame, std::vector<uint32_t>& codes) {
  const auto* low = reinterpret_cast<const uint64_t*>(stack);
  const auto* high = reinterpret_cast<const uint64_t*>(stack + kStack);
  while (frame > low && frame < high - 1 && codes.size() < 64) {
    if (frame[1] == 0) return;
    codes.push_back(code_of(reinterpret_cast<const void*>(frame[1])));
    frame = reinterpret_cast<const uint64_t*>(frame[0]);
  }
}

void on_signal(int, siginfo_t* info, void* context) {
  if (now.fiber == nullptr) {  // no kernel: it happens again, to whom it concerned before
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before[i], nullptr);
    return;
  }
  const auto* registers = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs;
  interrupted = code_of(reinterpret_cast<const void*>(registers[REG_RIP] + 1));
  char address[24];
  std::snprintf(address, sizeof address, "%p", info->si_addr);
  fault(std::string("out of bounds of global memory: there is none at ") + address);
}

}  // namespace

void catch_signals() {
  static bool caught = false;
  if (caught) return;
  caught = true;
  struct sigaction action = {};
  action.sa_sigaction = &on_signal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before[i]);
}

uintptr_t start_of_object() { return reinterpret_cast<uintptr_t>(object().dli_fbase); }

std::string place_of(uint32_t code) { return ask({code}); }

std::string place_of(const Site& site) {
  return site.file == nullptr ? "?" : shortened(site.file) + ":" + std::to_string(site.line);
}

std::string place_of_thread(const Block& block, int thread) {
  const Fiber& fiber = block.fibers[static_cast<size_t>(thread)];
  std::vector<uint32_t> codes;
  if (&fiber == now.fiber && fiber.state == State::kReady) {
    if (interrupted != 0) codes.push_back(interrupted);
    walk(fiber.stack, static_cast<uint64_t*>(__builtin_frame_address(0)), codes);
  } else {
    const auto* saved = static_cast<const Saved*>(fiber.stack_pointer);
    codes.push_back(code_of(reinterpret_cast<const void*>(saved->resume)));
    walk(fiber.stack, reinterpret_cast<const uint64_t*>(saved->frame), codes);
  }
  return ask(codes);
}

std::string name_of(const Block& block) {
  std::string text = "block " + std::to_string(block.index[0]);
  if (now.grid.blocks[1] * now.grid.blocks[2] == 1) return text;
  return text + ", " + std::to_string(block.index[1]) + ", " + std::to_string(block.index[2]);
}

void fault(const std::string& what, const std::string& more) {
  const Block& block = *now.block;
  constexpr const char* kOrders[] = {"ascending", "descending", "shuffled"};
  const std::string window =
      now.schedule.window > 0 ? std::to_string(now.schedule.window) : std::string("all");
  const std::string place = place_of_thread(block, current_thread());
  const char* test = std::getenv("PYTEST_CURRENT_TEST");
  std::fprintf(stderr,
               "\ncuda_on_host: %s\n  kernel %s, %s, thread %d, %s\n%s"
               "  --schedule %s,%s%s%s\n",
               what.c_str(), now.grid.kernel, name_of(block).c_str(), current_thread(),
               place.c_str(), more.c_str(), kOrders[static_cast<int>(now.schedule.order)],
               window.c_str(), test ? "; in " : "", test ? test : "");
  std::fflush(stderr);
  _exit(kFaultExit);
}

}  // namespace tk::cuda::host
