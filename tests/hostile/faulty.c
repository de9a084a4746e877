/* A shim for LD_PRELOAD: the n-th I/O call on files below one folder fails, once or from then on.
 *
 * Counted are open (creat, openat …), write (pwrite, writev …), fsync (fdatasync), rename (renameat, renameat2), mkdir
 * (mkdirat) and ftruncate. Tests steer it by faulty_set and faulty_count.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static atomic_long count, at;
static atomic_int ever, error_number;

void faulty_set(const char *folder, long n, int for_ever, int number) {
  strncpy(root, folder, sizeof root - 1);
  atomic_store(&ever, for_ever);
  atomic_store(&error_number, number);
  atomic_store(&at, n);
  atomic_store(&count, 0);
}

long faulty_count(void) { return atomic_load(&count); }

static int fails(void) {
  long number = atomic_fetch_add(&count, 1) + 1, wanted = atomic_load(&at);
  if (wanted <= 0 || (atomic_load(&ever) ? number < wanted : number != wanted)) return 0;
  errno = atomic_load(&error_number);
  return 1;
}

static int below(const char *path) { return root[0] && strncmp(path, root, strlen(root)) == 0; }

static int path_fails(int folder, const char *path) {
  char whole[2 * PATH_MAX], link[64];
  if (!root[0] || !path) return 0;
  if (path[0] != '/') {
    ssize_t length;
    if (folder == AT_FDCWD) {
      if (!getcwd(whole, PATH_MAX)) return 0;
      length = strlen(whole);
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      length = syscall(SYS_readlink, link, whole, PATH_MAX - 1);
      if (length < 0) return 0;
      whole[length] = 0;
    }
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    path = whole;
  }
  return below(path) && fails();
}

static int file_fails(int file) {
  char link[64], path[PATH_MAX];
  int before = errno;
  if (!root[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = syscall(SYS_readlink, link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return 0;
  path[length] = 0;
  return below(path) && fails();
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags)                           \
  mode_t mode = 0;                            \
  if ((flags) & (O_CREAT | O_TMPFILE)) {      \
    va_list more;                             \
    va_start(more, flags);                    \
    mode = va_arg(more, mode_t);              \
    va_end(more);                             \
  }

int open(const char *path, int flags, ...) {
  MODE(flags)
  return path_fails(AT_FDCWD, path) ? -1 : NEXT(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE(flags)
  return path_fails(AT_FDCWD, path) ? -1 : NEXT(open64)(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
  MODE(flags)
  return path_fails(folder, path) ? -1 : NEXT(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
  MODE(flags)
  return path_fails(folder, path) ? -1 : NEXT(openat64)(folder, path, flags, mode);
}
FILE *fopen(const char *path, const char *how) { return path_fails(AT_FDCWD, path) ? NULL : NEXT(fopen)(path, how); }
FILE *fopen64(const char *path, const char *how) { return path_fails(AT_FDCWD, path) ? NULL : NEXT(fopen64)(path, how); }
ssize_t write(int file, const void *bytes, size_t size) { return file_fails(file) ? -1 : NEXT(write)(file, bytes, size); }
ssize_t pwrite(int file, const void *bytes, size_t size, off_t place) {
  return file_fails(file) ? -1 : NEXT(pwrite)(file, bytes, size, place);
}
ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t place) {
  return file_fails(file) ? -1 : NEXT(pwrite64)(file, bytes, size, place);
}
ssize_t writev(int file, const struct iovec *parts, int parts_count) {
  return file_fails(file) ? -1 : NEXT(writev)(file, parts, parts_count);
}
int fsync(int file) { return file_fails(file) ? -1 : NEXT(fsync)(file); }
int fdatasync(int file) { return file_fails(file) ? -1 : NEXT(fdatasync)(file); }
int ftruncate(int file, off_t size) { return file_fails(file) ? -1 : NEXT(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) { return file_fails(file) ? -1 : NEXT(ftruncate64)(file, size); }
int rename(const char *one, const char *other) { return path_fails(AT_FDCWD, other) ? -1 : NEXT(rename)(one, other); }
int renameat(int from, const char *one, int to, const char *other) {
  return path_fails(to, other) ? -1 : NEXT(renameat)(from, one, to, other);
}
int renameat2(int from, const char *one, int to, const char *other, unsigned flags) {
  return path_fails(to, other) ? -1 : NEXT(renameat2)(from, one, to, other, flags);
}
int mkdir(const char *path, mode_t mode) { return path_fails(AT_FDCWD, path) ? -1 : NEXT(mkdir)(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) {
  return path_fails(folder, path) ? -1 : NEXT(mkdirat)(folder, path, mode);
}
