package serving;

import io.netty.buffer.ByteBuf;
import io.netty.channel.Channel;
import io.netty.channel.ChannelDuplexHandler;
import io.netty.channel.ChannelFuture;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelInboundHandlerAdapter;
import io.netty.channel.ChannelOption;
import io.netty.channel.ChannelPipeline;
import io.netty.channel.ChannelPromise;
import io.netty.channel.EventLoopGroup;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaders;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.HttpResponse;
import io.netty.handler.codec.http.HttpServerKeepAliveHandler;
import io.netty.handler.codec.http.HttpVersion;
import io.netty.handler.codec.http.LastHttpContent;
import io.netty.util.ReferenceCountUtil;
import io.netty.util.internal.logging.InternalLoggerFactory;
import io.netty.util.internal.logging.Slf4JLoggerFactory;
import java.io.IOException;
import java.security.GeneralSecurityException;
import java.util.ArrayDeque;
import java.util.Queue;
import java.util.Set;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.apache.commons.cli.DefaultParser;
import org.pytorch.serve.ModelServer;
import org.pytorch.serve.metrics.MetricCache;
import org.pytorch.serve.servingsdk.impl.PluginsManager;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.Connector;
import org.pytorch.serve.util.ConnectorType;
import org.pytorch.serve.util.TokenAuthorization;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/**
 * TorchServe's frontend without gRPC, and with handlers of ours in each connection
 * ({@link Requests}). TorchServe has no setting for any of this.
 */
public final class Frontend extends ModelServer {
    private Frontend(ConfigManager config) {
        super(config);
    }

    /** Does what ModelServer.main does, with this class. */
    public static void main(String[] arguments) {
        try {
            ConfigManager.init(
                    new ConfigManager.Arguments(
                            new DefaultParser()
                                    .parse(ConfigManager.Arguments.getOptions(), arguments)));
            TokenAuthorization.init();
            PluginsManager.getInstance().initialize();
            MetricCache.init();
            InternalLoggerFactory.setDefaultFactory(Slf4JLoggerFactory.INSTANCE);
            Frontend frontend = new Frontend(ConfigManager.getInstance());
            Runtime.getRuntime().addShutdownHook(new Thread(frontend::stop));
            frontend.startAndWait();
        } catch (Throwable error) {
            error.printStackTrace();
        } finally {
            System.exit(1);
        }
    }

    /** Start none: one call of StreamPredictions stops the worker and all requests in it. */
    @Override
    public void startGRPCServers() {}

    @Override
    public ChannelFuture initializeServer(
            Connector connector, EventLoopGroup parents, EventLoopGroup children, ConnectorType type)
            throws InterruptedException, IOException, GeneralSecurityException {
        ChannelFuture closed = super.initializeServer(connector, parents, children, type);
        closed.channel().pipeline().addFirst(new Connections());
        return closed;
    }

    /** Sees each new connection before TorchServe's own handlers are added to it. */
    private static final class Connections extends ChannelInboundHandlerAdapter {
        @Override
        public void channelRead(ChannelHandlerContext context, Object connection) {
            ((Channel) connection).pipeline().addLast(new Setup());
            context.fireChannelRead(connection);
        }
    }

    /** Adds our handlers between TorchServe's, before the first byte is read. */
    private static final class Setup extends ChannelInboundHandlerAdapter {
        @Override
        public void channelRegistered(ChannelHandlerContext context) {
            // TorchServe's 0 resets connections instead of ending them: clients lose unread data.
            context.channel().config().setOption(ChannelOption.SO_LINGER, -1);
            ChannelPipeline pipeline = context.pipeline();
            pipeline.addAfter("http", "keep-alive", new HttpServerKeepAliveHandler());
            pipeline.addAfter("aggregator", "requests", new Requests());
            context.fireChannelRegistered();
            pipeline.remove(this);
        }
    }

    /**
     * Passes the requests of one connection on, one after the other.
     *
     * <ul>
     *   <li>A client may send requests without waiting for the responses (pipelining). TorchServe
     *       would answer them in the order in which they finish.
     *   <li>OpenAI's paths also work without the model's name and version.
     *   <li>curl sends JSON with the type of a form, unless told otherwise.
     *   <li>The handler learns the method from the header http_method.
     *   <li>A client of HTTP/1.0 knows no chunks: its stream ends with the connection.
     * </ul>
     */
    private static final class Requests extends ChannelDuplexHandler {
        private static final Pattern BARE = Pattern.compile("/(?:openai/)?(v1(?:/.*)?)");
        private static final Pattern WITHOUT_VERSION =
                Pattern.compile("/predictions/([^/]+)/(v1(?:/.*)?)");
        private static final Pattern KSERVE = Pattern.compile("/v1/models/[^/]+:(predict|explain)");
        private static final String FORM = "application/x-www-form-urlencoded";

        private final Queue<FullHttpRequest> waiting = new ArrayDeque<>();
        private boolean busy;
        private boolean chunks;

        @Override
        public void channelRead(ChannelHandlerContext context, Object message) throws Exception {
            FullHttpRequest request = (FullHttpRequest) message;
            if (busy) {
                waiting.add(request);
                context.channel().config().setAutoRead(false);
            } else {
                pass(context, request);
            }
        }

        @Override
        public void write(ChannelHandlerContext context, Object message, ChannelPromise promise) {
            if (message instanceof HttpResponse && !chunks) {
                ((HttpResponse) message).headers().remove(HttpHeaderNames.TRANSFER_ENCODING);
            }
            boolean last = message instanceof LastHttpContent;
            context.write(message, promise);
            if (last) {
                context.executor().execute(() -> next(context));
            }
        }

        @Override
        public void channelInactive(ChannelHandlerContext context) {
            waiting.forEach(ReferenceCountUtil::release);
            waiting.clear();
            context.fireChannelInactive();
        }

        private void next(ChannelHandlerContext context) {
            busy = false;
            FullHttpRequest request = waiting.poll();
            if (request == null) {
                context.channel().config().setAutoRead(true);
            } else if (context.channel().isActive()) {
                pass(context, request);
            } else {
                request.release();
            }
        }

        private void pass(ChannelHandlerContext context, FullHttpRequest request) {
            busy = true;
            chunks = !request.protocolVersion().equals(HttpVersion.HTTP_1_0);
            HttpHeaders headers = request.headers();
            headers.remove("url_path"); // TorchServe adds it, but not on each path
            headers.set("http_method", request.method().name());
            if (request.method().equals(HttpMethod.HEAD)) {
                request.setMethod(HttpMethod.GET); // plug-ins know no HEAD; netty sends no body
            } else if (request.uri().equals("/metrics") && !request.method().equals(HttpMethod.GET)) {
                request.setMethod(HttpMethod.POST); // which the plug-in rejects
            }
            if (request.decoderResult().isSuccess()) {
                request.setUri(complete(request.uri()));
                if (isForm(headers) && beginsAsJson(request.content())) {
                    headers.set(HttpHeaderNames.CONTENT_TYPE, "application/json");
                }
            }
            context.fireChannelRead(request);
        }

        /** Adds the model's name and version to OpenAI's paths, and removes empty segments. */
        private static String complete(String uri) {
            int query = uri.indexOf('?');
            String path = (query < 0 ? uri : uri.substring(0, query)).replaceAll("/{2,}", "/");
            String parameters = query < 0 ? "" : uri.substring(query);
            Matcher bare = BARE.matcher(path);
            Matcher without = WITHOUT_VERSION.matcher(path);
            String name = null;
            String rest = null;
            if (bare.matches() && !KSERVE.matcher(path).matches()) {
                Set<String> models = ModelManager.getInstance().getStartupModels();
                name = models.size() == 1 ? models.iterator().next() : null;
                rest = bare.group(1);
            } else if (without.matches()) {
                name = without.group(1);
                rest = without.group(2);
            }
            Model model =
                    name == null ? null : ModelManager.getInstance().getDefaultModels().get(name);
            if (model != null) {
                path = "/predictions/" + name + "/" + model.getVersion() + "/" + rest;
            }
            return path + parameters;
        }

        private static boolean isForm(HttpHeaders headers) {
            String type = headers.get(HttpHeaderNames.CONTENT_TYPE, "");
            return type.regionMatches(true, 0, FORM, 0, FORM.length());
        }

        private static boolean beginsAsJson(ByteBuf content) {
            int first = content.forEachByte(b -> b == ' ' || b == '\t' || b == '\r' || b == '\n');
            return first >= 0 && content.getByte(first) == '{';
        }
    }
}
