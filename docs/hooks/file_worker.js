// Run the search in a hidden frame where pages are read from disk: browsers start no workers for file:// addresses.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.waiting = [];
      this.onmessage = null;
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html>";
      frame.onload = () => this.start(frame.contentWindow, address);
      document.body.append(frame);
    }

    start(inner, address) {
      inner.postMessage = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      inner.importScripts = (...addresses) =>
        addresses.reduce((before, next) => before.then(() => this.load(inner, next)), Promise.resolve());
      this.load(inner, address).then(() => {
        this.inner = inner;
        this.waiting.forEach((data) => this.postMessage(data));
      });
    }

    load(inner, address) {
      return new Promise((resolve, reject) => {
        const script = inner.document.createElement("script");
        script.src = address;
        script.onload = resolve;
        script.onerror = reject;
        inner.document.head.append(script);
      });
    }

    postMessage(data) {
      if (!this.inner) {
        this.waiting.push(data);
      } else {
        this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data }));
      }
    }

    terminate() {
      this.inner?.frameElement.remove();
    }
  };
}
