// Delivery. The outbox keeps what you typed until the server has it. The connection
// carries it there; it does not trust a silent socket, but replaces it.

// --- Time: the page's limits are attributes of `.room`, in seconds ---
const limits = document.querySelector(".room").dataset;
export const limit = (name) => 1000 * limits[name];

// Look at the clock, don't count ticks: timers stand still while a laptop sleeps. Compare
// both ways: the clock may have been set back.
export const isOver = (name, since) => Math.abs(Date.now() - since) > limit(name);

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
const makeNonce = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

// --- The connection: one socket at a time ---
export class Connection {
  socket = null;
  live = false; // `welcome` has come
  liveSince = 0;
  heard = 0; // when the last event came
  asked = 0; // since when the server owes us an answer; 0 if it does not
  failures = 0; // connections in a row that did not last
  blocked = 0; // of these, the last ones that failed though the server answers HTTP
  timer = 0; // of the next attempt

  // `page` has lastId, handle, lost, explain and signIn.
  constructor(page) {
    this.page = page;
    setInterval(() => this.check(), 1000);
  }

  connect() {
    this.drop();
    this.heard = this.asked = Date.now();
    const base = location.href.replace("http", "ws"); // https becomes wss
    this.socket = new WebSocket(new URL(`/ws?after=${this.page.lastId()}`, base));
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
      Object.assign(this, { live: true, liveSince: this.heard, blocked: 0 });
    }
    this.page.handle(event);
  }

  check() {
    if (!this.socket) return;
    const unanswered = this.asked && isOver("answer", this.asked);
    if (unanswered || isOver("silence", this.heard)) this.lose();
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
    Object.assign(this, { socket: null, timer: 0, live: false });
  }

  // A connection that was live only for a moment counts as a failure. Otherwise a server
  // that welcomes and hangs up would be asked twice a second for ever. A server that says
  // it stops (1001) is an exception: an instructor's saves restart it many times.
  lose(code) {
    const { live } = this;
    const lasted = live && (code === 1001 || isOver("answer", this.liveSince));
    this.failures = lasted ? 1 : this.failures + 1;
    const spent = live ? 0 : Math.max(0, Date.now() - this.heard); // by an attempt that hung
    this.drop();
    // Spread the pauses, 50 to 150 %: a thousand pages must not come back in one moment.
    const pause = Math.min(limit("retry"), 250 * 2 ** this.failures);
    const delay = pause * (0.5 + Math.random()) - spent;
    this.timer = setTimeout(() => this.connect(), delay);
    this.page.lost(code, live);
    if (!live) this.askWhy();
  }

  // A handshake that fails does not say why; the same address over HTTP does. Believe the
  // chat's own answer only: gateways redirect, and answer 401, too. Don't wait for the
  // answer: the next attempt may be the one that works.
  async askWhy() {
    const signal = AbortSignal.timeout(limit("answer"));
    const answer = await fetch("/ws", { redirect: "manual", signal }).catch(() => null);
    if (this.live) return;
    const mine = answer?.headers.get("WWW-Authenticate") === 'Cookie realm="chat"';
    if (answer?.status === 401 && mine) return this.page.signIn();
    const status = answer?.status; // 400: the server is well, only the handshake is missing
    this.blocked = status === 400 ? this.blocked + 1 : 0;
    if (!this.blocked || this.blocked > 2) this.page.explain(REASONS[status] ?? REASONS.other);
  }
}

const REASONS = {
  0: "Something answers in the chat's place. Does your network want you to sign in?", // a redirect
  400: "Something between you and the chat blocks WebSockets. The page keeps trying.",
  429: "You have too many windows of the chat open. Close one, and this one connects.",
  503: "The chat is out of service for a moment. The page connects as soon as it can.",
  other: "The chat does not answer. The page keeps trying, and then sends what you write.",
};
