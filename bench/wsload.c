/* Load for a WebSocket server: connections that read, and some that also send.

     cc -O2 -o wsload wsload.c
     wsload -p PORT -n 1000 -s 8 -w 8 -d 2 -m '{"text": "%s"}' -P PID < cookies

   One thread and epoll: it takes less of a core than any server that it measures, so
   the servers are not held back by their readers. It prints one JSON object.

     -n  connections       -k  more of them, that never read
     -s  how many send     -w  messages in flight for each sender
     -i  instead of -w: seconds from one message of the only sender to the next
     -d  seconds           -a  seconds of warming up before
     -c  at most so many messages
     -m  a message, with %s where its nonce goes
     -P  the server's process, whose CPU time and memory are read
   Standard input: cookies, one a line; the connections take them in turns.

   Each nonce begins with ~ and ten digits, so a message is found in every frame that
   carries it, whatever the server wraps around it. A message has arrived when the last
   connection has it; its sender may send the next one when its own copy comes back. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define KEPT (1 << 21) /* messages that may be on their way at a time */
#define NONCE 36       /* as long as a UUID */

enum state { CONNECTING, HANDSHAKE, OPEN, CLOSED };

struct connection {
  int fd, number, sender, stalled, in_flight;
  enum state state;
  uint8_t *rest; /* the beginning of a frame whose end has not come yet */
  size_t rest_size, rest_room;
};

struct message {
  double sent;
  int left; /* connections that do not have it yet */
  struct connection *sender;
};

static int port, readers = 10, senders = 1, window = 1, stalled = 0, pid = 0;
static double seconds = 2, warm_up = 0.5, interval = 0;
static long most = 1L << 40;
static const char *template = "%s";
static char **cookies;
static int cookie_count;

static struct connection *connections;
static struct message *messages;
static struct connection **speakers;
static int epoll, open_count, closed_count, talking, blocked;
static long sent, arrived, deliveries, welcomes;
static double read_at, welcomed; /* when the last byte, the last welcome came */
static double stirred;           /* when something came that is not a message */
static char run[NONCE + 1];      /* tells the nonces of two runs apart */

/* --- The clock, and what the system says of the server --- */
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *format, ...) {
  va_list list;
  va_start(list, format);
  vfprintf(stderr, format, list);
  fputc('\n', stderr);
  exit(1);
}

static double cpu(void) { /* seconds of all its threads, in nanoseconds */
  char path[320];
  double total = 0;
  snprintf(path, sizeof path, "/proc/%d/task", pid);
  DIR *folder = pid ? opendir(path) : NULL;
  if (!folder) return 0;
  for (struct dirent *entry; (entry = readdir(folder));) {
    if (entry->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "/proc/%d/task/%s/schedstat", pid, entry->d_name);
    FILE *file = fopen(path, "r");
    unsigned long long used = 0;
    if (!file) continue;
    if (fscanf(file, "%llu", &used) == 1) total += used / 1e9;
    fclose(file);
  }
  closedir(folder);
  return total;
}

static double memory(void) { /* KiB */
  char path[64], line[256];
  double size = 0;
  snprintf(path, sizeof path, "/proc/%d/status", pid);
  FILE *file = pid ? fopen(path, "r") : NULL;
  if (!file) return 0;
  while (fgets(line, sizeof line, file))
    if (sscanf(line, "VmRSS: %lf", &size) == 1) break;
  fclose(file);
  return size;
}

static double own_cpu(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
         (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

/* --- How long messages took: counted in steps of a 64th of their size --- */
static long delays[64 * 64];
static long delay_count;
static double longest;

static void note_delay(double delay) {
  uint64_t t = delay * 1e9 + 64;
  int power = 63 - __builtin_clzll(t);
  delays[(power << 6) + ((t >> (power - 6)) & 63)]++;
  delay_count++;
  if (delay > longest) longest = delay;
}

static double percentile(double share) { /* milliseconds */
  long left = share * delay_count;
  for (int i = 0; delay_count && i < 64 * 64; i++)
    if ((left -= delays[i]) < 0)
      return ((1ULL << (i >> 6)) + ((uint64_t)(i & 63) << ((i >> 6) - 6)) - 64) / 1e6;
  return 0;
}

/* --- Sending --- */
static void drop(struct connection *c) {
  if (c->state == CLOSED) return;
  open_count -= c->state == OPEN;
  closed_count++;
  c->state = CLOSED;
  close(c->fd); /* epoll forgets it */
}

static size_t make_frame(uint8_t *out, int opcode, const char *data, size_t size) {
  static uint32_t mask = 2463534242;
  uint8_t key[4];
  size_t head = 2;
  mask = mask * 1664525 + 1013904223;
  memcpy(key, &mask, 4);
  out[0] = 0x80 | opcode;
  out[1] = 0x80 | (size < 126 ? size : 126);
  if (size >= 126) out[2] = size >> 8, out[3] = size, head = 4;
  memcpy(out + head, key, 4);
  head += 4;
  for (size_t i = 0; i < size; i++) out[head + i] = data[i] ^ key[i & 3];
  return head + size;
}

static int send_whole(struct connection *c, const uint8_t *data, size_t size) {
  size_t done = 0;
  while (done < size) {
    ssize_t count = send(c->fd, data + done, size - done, MSG_NOSIGNAL);
    if (count > 0) {
      done += count;
    } else if (errno == EAGAIN) {
      if (!done) return 0; /* nothing of it is sent: try again later */
      poll(&(struct pollfd){c->fd, POLLOUT, 0}, 1, 1000);
    } else if (errno != EINTR) {
      drop(c);
      return 0;
    }
  }
  return 1;
}

static int send_message(struct connection *c) {
  static char text[1 << 14];
  static uint8_t frame[1 << 15];
  char nonce[2 * NONCE];
  if (sent >= most || sent - arrived >= KEPT) return 0;
  snprintf(nonce, sizeof nonce, "~%010ld~%s", sent, run);
  nonce[NONCE] = 0;
  const char *place = strstr(template, "%s");
  int size = snprintf(text, sizeof text, "%.*s%s%s", (int)(place - template), template,
                      nonce, place + 2);
  messages[sent % KEPT] = (struct message){now(), readers, c};
  if (!send_whole(c, frame, make_frame(frame, 1, text, size))) return 0;
  sent++;
  c->in_flight++;
  return 1;
}

static void fill(struct connection *c) { /* up to what it may have in flight */
  while (talking && !interval && c->state == OPEN && c->in_flight < window)
    if (!send_message(c)) {
      blocked = 1;
      return;
    }
}

/* --- Reading --- */
static int begins(const uint8_t *data, size_t size, const char *type) {
  return memmem(data, size < 24 ? size : 24, type, strlen(type)) != NULL;
}

static void take_text(struct connection *c, const uint8_t *data, size_t size) {
  if (begins(data, size, "\"welcome\"")) welcomes++, welcomed = read_at;
  if (begins(data, size, "\"error\"")) fail("refused: %.*s", (int)size, data);
  if (!begins(data, size, "\"message\"")) { /* a receipt, or a person who came */
    stirred = read_at;
    return;
  }
  const uint8_t *nonce = memchr(data, '~', size);
  if (!nonce || nonce + NONCE > data + size || nonce[11] != '~') return;
  if (memcmp(nonce + 12, run, NONCE - 12)) return; /* of another run */
  long number = atol((const char *)nonce + 1);
  struct message *message = &messages[number % KEPT];
  if (number >= sent || !message->left) fail("a message came twice");
  deliveries++;
  if (message->sender == c) c->in_flight--;
  if (--message->left) return;
  arrived++;
  note_delay(read_at - message->sent);
}

/* Take whole frames; return how many bytes they had. */
static size_t take_frames(struct connection *c, uint8_t *data, size_t size) {
  size_t start = 0;
  while (size - start >= 2 && c->state == OPEN) {
    uint8_t *frame = data + start;
    size_t length = frame[1], head = 2;
    if (length >= 126) {
      head = length == 126 ? 4 : 10;
      if (size - start < head) break;
      length = 0;
      for (size_t i = 2; i < head; i++) length = length << 8 | frame[i];
    }
    if (size - start < head + length) break;
    switch (frame[0]) {
      case 0x81: take_text(c, frame + head, length); break;
      case 0x82: break;
      case 0x88: drop(c); break;
      case 0x89: {
        uint8_t pong[140];
        send_whole(c, pong, make_frame(pong, 10, (char *)frame + head, length));
        break;
      }
      default: fail("not a frame that a server sends: %02x", frame[0]);
    }
    start += head + length;
  }
  return start;
}

static size_t take_answer(struct connection *c, uint8_t *data, size_t size) {
  uint8_t *end = memmem(data, size, "\r\n\r\n", 4);
  if (!end) return 0;
  if (memcmp(data, "HTTP/1.1 101", 12)) fail("refused: %.*s", (int)size, data);
  c->state = OPEN;
  open_count++;
  if (c->stalled) epoll_ctl(epoll, EPOLL_CTL_DEL, c->fd, NULL);
  return end + 4 - data;
}

static void take(struct connection *c) {
  static uint8_t buffer[1 << 19];
  memcpy(buffer, c->rest, c->rest_size);
  uint8_t *place = buffer + c->rest_size;
  ssize_t count = recv(c->fd, place, sizeof buffer - c->rest_size, 0);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (count <= 0) {
    drop(c);
    return;
  }
  size_t size = c->rest_size + count, start = 0;
  read_at = now();
  if (c->state == HANDSHAKE) start = take_answer(c, buffer, size);
  if (c->state == OPEN && !c->stalled) start += take_frames(c, buffer + start, size - start);
  if (c->state == CLOSED) return;
  c->rest_size = size - start;
  if (c->rest_size > c->rest_room)
    c->rest = realloc(c->rest, c->rest_room = 2 * c->rest_size);
  memcpy(c->rest, buffer + start, c->rest_size);
  if (c->sender) fill(c);
}

/* --- Connecting --- */
static void begin(struct connection *c) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  int yes = 1, small = 1 << 16;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK); /* and nowhere else */
  c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  if (c->stalled) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
  if (connect(c->fd, (void *)&address, sizeof address) && errno != EINPROGRESS)
    fail("connect: %s", strerror(errno));
  struct epoll_event event = {.events = EPOLLOUT, .data.ptr = c};
  epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
}

static void shake_hands(struct connection *c) {
  char request[8192];
  int size = snprintf(request, sizeof request,
                      "GET /ws HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                      "Origin: http://127.0.0.1:%d\r\n"
                      "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                      "Sec-WebSocket-Version: 13\r\n"
                      "Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\n%s%s\r\n",
                      port, port, cookie_count ? "Cookie: " : "",
                      cookie_count ? cookies[c->number % cookie_count] : "");
  if (send(c->fd, request, size, MSG_NOSIGNAL) != size) fail("the server closed");
  c->state = HANDSHAKE;
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
  epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
}

static void wait_for_events(int milliseconds) {
  static struct epoll_event events[4096];
  int count = epoll_wait(epoll, events, 4096, milliseconds);
  for (int i = 0; i < count; i++) {
    struct connection *c = events[i].data.ptr;
    if (c->state == CONNECTING) shake_hands(c);
    else if (c->state != CLOSED) take(c);
  }
  if (blocked) {
    blocked = 0;
    for (int i = 0; i < senders; i++) fill(speakers[i]);
  }
}

static void connect_all(void) { /* fewer at a time than any server's backlog */
  int all = readers + stalled, started = 0;
  double limit = now() + 120;
  while (open_count < all) {
    while (started < all && started - open_count < 32) begin(&connections[started++]);
    wait_for_events(10);
    if (closed_count) fail("the server closed a connection");
    if (now() > limit) fail("only %d of %d are connected", open_count, all);
  }
}

static void settle(double quiet) { /* until nothing but messages has come for a while */
  double limit = now() + 20;
  stirred = now();
  while (now() < limit && now() - stirred < quiet) wait_for_events(10);
}

/* --- Talking --- */
static void talk(double duration) {
  double start = now(), end = start + duration, due = start;
  int idle = interval ? 1 : 0; /* do not sleep while there is more to come */
  talking = 1;
  for (int i = 0; i < senders; i++) fill(speakers[i]);
  while (now() < end && (sent < most || arrived < sent) && open_count) {
    if (interval && now() >= due) send_message(speakers[0]), due += interval;
    wait_for_events(idle);
  }
  talking = 0;
  end = now() + 10 + duration;
  while (arrived < sent && now() < end && now() - read_at < 10) wait_for_events(idle);
}

static int drain(struct connection *c) { /* whether the server has cut it off */
  static char buffer[1 << 16];
  struct pollfd poller = {c->fd, POLLIN, 0};
  while (poll(&poller, 1, 500) > 0)
    if (recv(c->fd, buffer, sizeof buffer, 0) <= 0) return 1;
  return 0;
}

static void read_options(int count, char **words) {
  for (int option; (option = getopt(count, words, "p:n:k:s:w:i:d:a:c:m:P:")) != -1;)
    switch (option) {
      case 'p': port = atoi(optarg); break;
      case 'n': readers = atoi(optarg); break;
      case 'k': stalled = atoi(optarg); break;
      case 's': senders = atoi(optarg); break;
      case 'w': window = atoi(optarg); break;
      case 'i': interval = atof(optarg); break;
      case 'd': seconds = atof(optarg); break;
      case 'a': warm_up = atof(optarg); break;
      case 'c': most = atol(optarg); break;
      case 'm': template = optarg; break;
      case 'P': pid = atoi(optarg); break;
      default: fail("see the head of wsload.c");
    }
  if (!strstr(template, "%s")) fail("-m: there is no %%s in the message");
  if (senders > readers) senders = readers;
  char *line = NULL;
  size_t room = 0;
  for (ssize_t size; (size = getline(&line, &room, stdin)) > 1;) {
    line[size - 1] = 0;
    cookies = realloc(cookies, (cookie_count + 1) * sizeof *cookies);
    char *with_end = malloc(size + 2);
    sprintf(with_end, "%s\r\n", line);
    cookies[cookie_count++] = with_end;
  }
}

static void prepare(void) {
  struct rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  snprintf(run, sizeof run, "%024.0f", now() * 1e9);
  epoll = epoll_create1(0);
  messages = calloc(KEPT, sizeof *messages);
  connections = calloc(readers + stalled, sizeof *connections);
  speakers = calloc(senders + 1, sizeof *speakers);
  for (int i = 0; i < readers + stalled; i++) {
    connections[i].number = i;
    connections[i].stalled = i >= readers;
  }
  for (int i = 0; i < senders; i++) { /* spread over the room */
    speakers[i] = &connections[(2L * i + 1) * readers / (2 * senders)];
    speakers[i]->sender = 1;
  }
}

int main(int count, char **words) {
  read_options(count, words);
  prepare();
  double size = memory(), used = cpu(), start = now();
  connect_all();
  double connected = now();
  settle(0.3);
  double connecting = cpu() - used, connection = (memory() - size) / open_count;
  double welcoming = welcomes ? welcomed - start : connected - start;
  int came = welcomes;
  if (warm_up) talk(warm_up);
  memset(delays, 0, sizeof delays);
  delay_count = longest = 0;
  long sent_before = sent, deliveries_before = deliveries;
  double own = own_cpu(), room = memory();
  used = cpu(), start = now();
  talk(seconds);
  double took = now() - start;
  used = cpu() - used, own = own_cpu() - own;
  long told = deliveries - deliveries_before, said = sent - sent_before;
  long missing = said * readers - told;
  for (long i = sent - said; missing && i < sent; i++) /* these took so long, at least */
    if (messages[i % KEPT].left) note_delay(now() - messages[i % KEPT].sent);
  int cut = 0;
  for (int i = readers; i < readers + stalled; i++) cut += drain(&connections[i]);
  printf("{\"connecting_cpu\": %f, \"welcoming\": %f, \"welcomes\": %d, \"kib\": %f, "
         "\"messages\": %ld, \"deliveries\": %ld, \"missing\": %ld, \"seconds\": %f, "
         "\"cpu\": %f, \"p50\": %f, \"p99\": %f, \"longest\": %f, \"load\": %f, "
         "\"growth\": %f, \"cut\": %d, \"closed\": %d}\n",
         connecting, welcoming, came, connection, said, told, missing, took, used,
         percentile(0.5), percentile(0.99), longest * 1e3, own / took,
         memory() - room, cut, closed_count);
  return 0; /* the sockets close with the process */
}
