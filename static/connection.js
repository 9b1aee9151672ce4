// Delivery. The outbox keeps what you typed until the server has it. The connection
// carries it there; it does not trust a silent socket, but replaces it.

// --- Memory: the storage of this tab, which may be full or refused by the browser ---
export function keep(key, value) {
  try {
    sessionStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function recall(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key));
  } catch {
    return null;
  }
}

// --- The outbox of one user: messages without a receipt, and the draft ---
export class Outbox {
  kept = true; // whether the storage has all of it

  constructor(user) {
    this.key = `unsent ${user}`;
    const { pending = [], draft = "" } = recall(this.key) ?? {};
    Object.assign(this, { pending, draft });
  }

  keep(draft) {
    this.draft = draft;
    this.kept = keep(this.key, { pending: this.pending, draft });
  }

  add(text) {
    const message = { nonce: makeNonce(), text };
    this.pending.push(message);
    this.keep("");
    return message;
  }

  // Return the message, or nothing if it had left.
  remove(nonce) {
    const message = this.pending.find((other) => other.nonce === nonce);
    this.pending = this.pending.filter((other) => other !== message);
    this.keep(this.draft);
    return message;
  }
}

// Don't use crypto.randomUUID: without https it exists on localhost only.
function makeNonce() {
  const numbers = crypto.getRandomValues(new Uint32Array(4));
  return Array.from(numbers, (number) => number.toString(36)).join("-");
}

// --- The connection: one socket at a time ---
export class Connection {
  socket = null;
  live = false; // `welcome` has come
  liveSince = 0;
  heard = 0; // when the last event came
  asked = 0; // since when the server owes us an answer; 0 if it does not
  failures = 0; // connections in a row that did not last
  blocked = 0; // attempts in a row that failed though the server answers HTTP
  timer = 0; // of the next attempt

  // `seconds(name)` is an interval; `page` has lastId, handle, lost, explain and signIn.
  constructor(seconds, page) {
    Object.assign(this, { seconds, page });
    setInterval(() => this.check(), 1000);
  }

  connect() {
    this.drop();
    const address = new URL("/ws", location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    address.searchParams.set("after", this.page.lastId());
    this.heard = this.asked = Date.now();
    this.socket = new WebSocket(address);
    this.socket.onmessage = ({ data }) => this.receive(JSON.parse(data));
    this.socket.onclose = ({ code }) => this.lose(code);
  }

  send(event) {
    this.asked = Date.now();
    this.socket.send(JSON.stringify(event));
  }

  receive(event) {
    this.heard = Date.now();
    if (!this.live) this.asked = this.heard; // the replay is on its way
    if (["welcome", "receipt", "error"].includes(event.type)) this.asked = 0;
    if (event.type === "welcome") {
      this.live = true;
      this.liveSince = this.heard;
      this.blocked = 0;
    }
    this.page.handle(event);
  }

  // Look at the clock, don't count ticks: timers stand still while a laptop sleeps.
  check() {
    if (!this.socket) return;
    const unanswered = this.asked && this.isOver("answer", this.asked);
    if (unanswered || this.isOver("silence", this.heard)) this.lose();
  }

  // Compare both ways: the clock may have been set back.
  isOver(name, since) {
    return Math.abs(Date.now() - since) > 1000 * this.seconds(name);
  }

  // After a sleep, or when the network comes back: don't wait for a timer.
  wake() {
    this.check();
    if (this.timer) this.connect();
  }

  // Detach the handlers first: a browser takes up to 60 s to close a dead socket, and its
  // late `close` would take the new connection down.
  drop() {
    clearTimeout(this.timer);
    if (this.socket) this.socket.onmessage = this.socket.onclose = null;
    this.socket?.close();
    this.socket = null;
    this.timer = 0;
    this.live = false;
  }

  // A connection that was live only for a moment counts as a failure. Otherwise a server
  // that welcomes and hangs up would be asked twice a second for ever. A server that says
  // it stops (1001) is an exception: an instructor's saves restart it many times.
  lose(code) {
    const { live } = this;
    const lasted = live && (code === 1001 || this.isOver("answer", this.liveSince));
    this.failures = lasted ? 1 : this.failures + 1;
    const spent = live ? 0 : Math.max(0, Date.now() - this.heard); // by an attempt that hung
    this.drop();
    this.page.lost(code, live);
    if (code === 1008) return this.page.signIn();
    const pause = Math.min(1000 * this.seconds("retry"), 250 * 2 ** this.failures);
    const delay = pause * (0.5 + Math.random()) - spent;
    this.timer = setTimeout(() => this.connect(), delay);
    return live || this.askWhy();
  }

  // A handshake that fails does not say why; the same address over HTTP does. Don't wait
  // for the answer: the next attempt may be the one that works.
  async askWhy() {
    const signal = AbortSignal.timeout(1000 * this.seconds("answer"));
    const answer = await fetch("/ws", { redirect: "manual", signal }).catch(() => null);
    if (this.live || !(this.timer || this.socket)) return;
    if (answer?.type === "opaqueredirect") return this.page.signIn();
    const status = answer?.status; // 400: the server is well, only the handshake is missing
    this.blocked = status === 400 ? this.blocked + 1 : 0;
    const tooEarly = status === 400 && this.blocked < 3;
    return this.page.explain(tooEarly ? "" : REASONS[status] ?? REASONS.none);
  }
}

const REASONS = {
  400: "Something between you and the chat blocks WebSockets. "
    + "The page keeps trying.",
  429: "You have too many windows of the chat open. Close one, and this one connects.",
  503: "The chat is out of service for a moment. The page connects as soon as it can.",
  none: "The chat does not answer. The page keeps trying, and then sends what you write.",
};
