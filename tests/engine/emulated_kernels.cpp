// Calls kernels of the library argv[1], in an emulator of the CPU.
//
// Its output starts with the name of the instruction set, NAME bytes. Each call on stdin is a `Call`
// and an image of the memory that the kernel reads and writes; the image is returned on stdout.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

constexpr int NAME = 64;
char* const BASE = reinterpret_cast<char*>(1l << 40);  // address of the image

// Same order as in `emulated_kernels.py`.
struct Call {
  char name[NAME];
  int64_t size;  // of the image
  int64_t integers[8];
  double real;
};
// Real arguments have registers of their own on ARM, so their place among the others does not matter.
typedef void Kernel(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);

void require(bool condition, const char* message) {
  if (condition) return;
  std::perror(message);
  std::exit(1);
}

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  require(library, dlerror());
  const auto instruction_set = (const char* (*)())dlsym(library, "instruction_set");
  std::printf("%-*s", NAME, instruction_set());
  std::fflush(stdout);
  for (Call call; std::fread(&call, sizeof call, 1, stdin);) {
    const auto kernel = (Kernel*)dlsym(library, call.name);
    require(kernel, call.name);
    void* image = mmap(BASE, call.size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    require(image == BASE, "mmap");
    require(std::fread(image, call.size, 1, stdin), "image");
    const int64_t* i = call.integers;
    kernel(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], call.real);
    require(std::fwrite(image, call.size, 1, stdout), "stdout");
    std::fflush(stdout);
    munmap(image, call.size);
  }
}
