/* Stands in for libkrun: writes each call to the file that KRUN_RECORD names, and fails the call
 * that KRUN_FAIL names with ENOTSUP. Compiled with NO_VHOST_USER it is a library that is too old. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int32_t record(const char *call, const char *arguments, int32_t result)
{
    const char *path = getenv("KRUN_RECORD");
    const char *fail = getenv("KRUN_FAIL");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) {
        fprintf(file, "%s(%s)\n", call, arguments);
        fclose(file);
    }
    return fail && strcmp(fail, call) == 0 ? -ENOTSUP : result;
}

#define RECORD(result, ...)                                                                        \
    do {                                                                                           \
        char text[4096];                                                                           \
        snprintf(text, sizeof text, __VA_ARGS__);                                                  \
        return record(__func__, text, result);                                                     \
    } while (0)

/* What a descriptor is: the numbers differ from run to run. */
static const char *kind(int fd)
{
    struct stat found;
    if (isatty(fd))
        return "terminal";
    if (fstat(fd, &found) == 0 && S_ISSOCK(found.st_mode))
        return "socket";
    return "something else";
}

int32_t krun_set_log_level(uint32_t level) { RECORD(0, "%u", level); }
int32_t krun_create_ctx(void) { RECORD(7, "%s", ""); }
int32_t krun_free_ctx(uint32_t ctx) { RECORD(0, "%u", ctx); }
int32_t krun_set_vm_config(uint32_t ctx, uint8_t cpus, uint32_t mib) { RECORD(0, "%u, %u, %u", ctx, cpus, mib); }
int32_t krun_disable_implicit_console(uint32_t ctx) { RECORD(0, "%u", ctx); }
int32_t krun_disable_implicit_vsock(uint32_t ctx) { RECORD(0, "%u", ctx); }
int32_t krun_disable_implicit_init(uint32_t ctx) { RECORD(0, "%u", ctx); }
int32_t krun_add_virtiofs3(uint32_t ctx, const char *tag, const char *path, uint64_t shm, bool ro)
{
    RECORD(0, "%u, %s, %s, %llu, %d", ctx, tag, path ? path : "NULL", (unsigned long long)shm, ro);
}
int32_t krun_fs_add_overlay_dir(uint32_t ctx, const char *tag, const char *path, uint32_t mode)
{
    RECORD(0, "%u, %s, %s, %o", ctx, tag, path, mode);
}
int32_t krun_fs_add_overlay_file(uint32_t ctx, const char *tag, const char *path, const uint8_t *data, size_t length,
                                 uint32_t mode, bool once)
{
    RECORD(0, "%u, %s, %s, %.*s, %o, %d", ctx, tag, path, (int)length, (const char *)data, mode, once);
}
int32_t krun_add_virtio_console_multiport(uint32_t ctx) { RECORD(3, "%u", ctx); }
int32_t krun_add_console_port_tty(uint32_t ctx, uint32_t console, const char *name, int fd)
{
    RECORD(fd > 0 ? 0 : -EINVAL, "%u, %u, '%s', %s", ctx, console, name, kind(fd));
}
int32_t krun_add_console_port_inout(uint32_t ctx, uint32_t console, const char *name, int in, int out)
{
    RECORD(0, "%u, %u, '%s', %s, %s", ctx, console, name, kind(in), kind(out));
}
#ifndef NO_VHOST_USER
int32_t krun_add_vhost_user_device(uint32_t ctx, uint32_t type, const char *socket, const char *name, uint16_t count,
                                   const uint16_t *sizes)
{
    char list[256] = "";
    for (uint16_t i = 0; i < count && i < 16; i++)
        snprintf(list + strlen(list), sizeof list - strlen(list), " %u", sizes[i]);
    RECORD(0, "%u, %u, %s, %s,%s", ctx, type, socket, name, list);
}
#endif
/* What a machine that its guest has taken over would try; KRUN_ATTACK asks for it. */
static void attack(void)
{
    char *const none[] = {NULL};
    const struct {
        const char *name;
        long number, first, second, third;
    } tries[] = {
        {"execve", SYS_execve, (long)"/bin/true", (long)none, (long)none},
        {"fork", SYS_clone, SIGCHLD, 0, 0},
        {"clone3", SYS_clone3, 0, 0, 0},
        {"kill", SYS_kill, getppid(), 0, 0},
        {"tgkill", SYS_tgkill, getppid(), getppid(), 0},
        {"own tgkill", SYS_tgkill, getpid(), gettid(), 0},
        {"ptrace", SYS_ptrace, PTRACE_TRACEME, 0, 0},
        {"socket inet", SYS_socket, AF_INET, SOCK_STREAM, 0},
        {"socket netlink", SYS_socket, AF_NETLINK, SOCK_RAW, 0},
        {"socket unix", SYS_socket, AF_UNIX, SOCK_STREAM, 0},
        {"mount", SYS_mount, (long)"none", (long)"/nonexistent", (long)"tmpfs"},
        {"unshare", SYS_unshare, CLONE_NEWUSER, 0, 0},
        {"setuid", SYS_setuid, getuid(), 0, 0},
        {"bpf", SYS_bpf, 0, 0, 0},
        {"keyctl", SYS_keyctl, 0, -3, 0},
        {"io_uring_setup", SYS_io_uring_setup, 1, 0, 0},
    };
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        errno = 0;
        long result = syscall(tries[i].number, tries[i].first, tries[i].second, tries[i].third, 0, 0);
        if (result == 0 && tries[i].number == SYS_clone)
            _exit(0);
        printf("%s: %s\n", tries[i].name, result < 0 ? strerrorname_np(errno) : "done");
    }
}
/* The real one ends the process with the guest's exit status. */
int32_t krun_start_enter(uint32_t ctx)
{
    char text[16];
    snprintf(text, sizeof text, "%u", ctx);
    int32_t result = record("krun_start_enter", text, 0);
    if (result < 0)
        return result;
    const char *status = getenv("KRUN_STATUS");
    if (getenv("KRUN_ATTACK"))
        attack();
    printf("started\n");
    fflush(stdout);
    _exit(status ? atoi(status) : 0);
}
